"""Output of commands: tables, JSON, and text in which data cannot control the terminal."""

import base64
import json
import math
import sys
from collections.abc import Iterable
from datetime import datetime
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text


def visible(text: str) -> str:
    """Escape the characters that Python considers unprintable: control characters, characters that change the text
    direction or have no width, and halves of surrogate pairs."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else _escaped(character) for character in text)


def visible_lines(text: str) -> str:
    """Escape unprintable characters as `visible` does, but keep line breaks."""
    return "\n".join(visible(line) for line in text.split("\n"))


def say(text: str, *, err: bool = False) -> None:
    """Print a text that may contain data, names or paths, on stdout or stderr."""
    click.echo(visible_lines(text), err=err)


def say_json(document: Any, *, indent: int | None = 2) -> None:
    """Print a document as strict JSON: NaN and infinities as null, bytes in base64, times in RFC 3339."""
    click.echo(json.dumps(json_form(document), indent=indent, allow_nan=False))


def json_form(value: Any) -> Any:
    """Convert a value for `say_json` to the form that the server's JSON has."""
    if isinstance(value, dict):
        return {name: json_form(member) for name, member in value.items()}
    if isinstance(value, list | tuple):
        return [json_form(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, datetime | bytes):
        return plain(value)
    return value


def plain(value: Any) -> str:
    """Return a value as text: times in RFC 3339, bytes in base64, lists as JSON. As in text sources, NaN, Infinity and
    -Infinity are written with these names. Return an empty text for None."""
    if value is None:
        return ""
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def cell(value: Any) -> str:
    """Return a value for a table or a sentence, `-` for None."""
    return "-" if value is None else visible(plain(value))


def table(columns: Iterable[tuple[str, bool]], rows: Iterable[Iterable[str]], *, title: str | None = None) -> None:
    """Print a table without lines.

    Args:
        columns: the name of each column, and whether it is aligned to the right.
    """
    made = Table(title=Text(title) if title else None, title_justify="left", box=None, pad_edge=False)
    for name, is_number in columns:
        made.add_column(Text(visible(name)), justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        # rich would interpret a str as markup, and drop `[bold]` from a value.
        made.add_row(*(Text(visible(text)) for text in row))
    # If the output goes to a file or a pipe, do not fold or pad it to the width of a terminal.
    console = Console(width=None if sys.stdout.isatty() else 400, highlight=False)
    with console.capture() as captured:
        console.print(made)
    click.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


def age(seconds: float | None) -> str:
    """Return a duration for a human reader, with two units at most."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.3g}s"
    units = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))
    parts = []
    rest = int(seconds)
    for unit, length in units:
        if rest >= length:
            parts.append(f"{rest // length}{unit}")
            rest %= length
    return " ".join(parts[:2])


def size(count: int) -> str:
    """Return a number of bytes for a human reader."""
    value = float(count)
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value = value / 1024
        unit = larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def _escaped(character: str) -> str:
    number = ord(character)
    if character in "\n\r\t":
        return {"\n": r"\n", "\r": r"\r", "\t": r"\t"}[character]
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
