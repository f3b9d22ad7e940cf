"""Print the demo's output, and keep findings to repeat at the end."""

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table

_LEAST_WIDTH = 120


class Terminal:
    """Prints headings, text and tables. Long lines of text are wrapped by the terminal, not by the demo."""

    def __init__(self) -> None:
        terminal = Console(highlight=False)
        width = max(terminal.width, _LEAST_WIDTH) if sys.stdout.isatty() else _LEAST_WIDTH
        self._console = Console(highlight=False, width=width)
        self._findings: list[tuple[str, str]] = []

    def heading(self, text: str) -> None:
        """Print the heading of a step."""
        self._console.print()
        self._console.rule(f"[bold]{text}", align="left")

    def say(self, text: str) -> None:
        """Print text, which may contain rich's markup."""
        self._console.print(text, soft_wrap=True)

    def show(self, table: Table) -> None:
        """Print a table."""
        self._console.print(table)

    def command(self, command: Sequence[str]) -> None:
        """Print a command in shell syntax."""
        self._console.print(f"  {shlex.join(command)}", soft_wrap=True, markup=False)

    def finding(self, what: str, measured: str) -> None:
        """Keep a measurement to show at the end."""
        self._findings.append((what, measured))

    def findings(self) -> Table:
        """Return a table of all findings, in order."""
        table = plain_table("what", "measured")
        for finding in self._findings:
            table.add_row(*finding)
        return table

    @contextmanager
    def working(self, text: str) -> Iterator[None]:
        """Show a spinner on a terminal while the `with` block runs."""
        if not self._console.is_terminal:
            yield
            return
        with self._console.status(f"{text} …"):
            yield


def plain_table(*columns: str, right: Sequence[str] = ()) -> Table:
    """Return an empty table without lines. The columns in `right` are right-aligned."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left")
    return table
