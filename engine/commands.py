"""The commands `shoal lookup` and `shoal status`: they read a store directly, with or without a server."""

import asyncio
import csv
import errno
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import click
from rich.console import Console
from rich.table import Table

from engine.control import WriterClient
from engine.durations import parse_duration
from engine.errors import LookupInvalid, WriterUnavailable
from engine.explain import StoredRow, explain
from engine.feature_store import FeatureStore
from engine.kernels.gathering import Status
from engine.live_status import describe_live
from engine.lookup import Stale
from engine.processes import describe_server
from engine.result import LookupResult
from engine.scrubbed import describe_scrub
from engine.standing import read_standing
from engine.status import describe_low_watermark, describe_version
from engine.storage import is_address
from engine.times import to_datetime
from engine.version import StoreVersion


class LocalPath(click.Path):
    """A path on this machine; an address such as s3://BUCKET would name a directory `s3:` here."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and is_address(value):
            self.fail(f"{value!r} is an address; this is to be the path of a directory on this machine", param, ctx)
        try:
            os.stat(value)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR):
                self.fail(f"{value!r} cannot be a directory: {error.strerror}", param, ctx)
        return super().convert(value, param, ctx)


STORE = click.option("--store", required=True, type=LocalPath(), metavar="DIR", help="The directory of the store.")


def _duration(_context: click.Context, _parameter: click.Parameter, value: str | None) -> timedelta | None:
    try:
        return parse_duration(value) if value is not None else None
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.command("lookup", short_help="Look up features of some keys, and where they come from.")
@STORE
@click.option("--features", metavar="VIEW:FEATURE,…", help="What to look up; VIEW:* is all of a view.")
@click.option("--service", metavar="NAME", help="Look up the features of this feature service instead.")
@click.option(
    "--key", "keys", multiple=True, required=True, metavar="KEY=VALUE", help="A join key; given again, another row."
)
@click.option("--max-age", callback=_duration, metavar="AGE", help="Accept rows up to this age, instead of the TTL.")
@click.option("--stale", type=click.Choice(get_args(Stale)), default="null", show_default=True, help="Of older rows.")
@click.option("--format", "form", type=click.Choice(["table", "json", "csv"]), default="table", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
@click.option("--explain", "explained", is_flag=True, help="Show what wrote each row, and what it was before.")
def lookup_command(
    store: Path,
    features: str | None,
    service: str | None,
    keys: tuple[str, ...],
    max_age: timedelta | None,
    stale: Stale,
    form: str,
    as_json: bool,
    explained: bool,
) -> None:
    """Look up features of some keys: values, statuses, event times and ages.

    Reads the store directly, whether it is being served or not.
    """
    if (features is None) == (service is None):
        raise click.UsageError("give either --features or --service")
    if explained and form == "csv":
        raise click.UsageError("--explain has no place in CSV; take --format table or json")
    opened = FeatureStore.open(store)
    version = opened.version()
    entities = _entities(version, keys)
    asked = service if service is not None else [part.strip() for part in (features or "").split(",") if part.strip()]
    result = opened.lookup(asked, entities, max_age=max_age, stale=stale)
    rows = _rows(result, entities, datetime.now(UTC))
    histories: dict[str, list[list[StoredRow]]] = {}
    if explained:
        histories = {view: explain(store, version, view, entities) for view in result.views}
    if as_json or form == "json":
        document: dict[str, Any] = {"version": result.version, "rows": rows}
        if explained:
            document["history"] = _history_document(histories)
            document["low_watermarks"] = {view: describe_low_watermark(version.view(view).record) for view in histories}
        click.echo(json.dumps(document, indent=2, default=_json_value))
    elif form == "csv":
        writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _csv_value(value) for name, value in row.items()} for row in rows)
    else:
        _print_table(result.version, rows)
        _print_histories(version, entities, histories)


def _entities(version: StoreVersion, keys: Sequence[str]) -> dict[str, list[str] | list[int]]:
    """The entities that `--key` options mean: a name given several times is a column of values."""
    integers = {
        key.name for view in version.views.values() for key in view.record.view_schema.join_keys if key.type == "int64"
    }
    given: dict[str, list[Any]] = {}
    for item in keys:
        name, separator, value = item.partition("=")
        if not separator:
            raise LookupInvalid(f"--key {item!r} has no value; write it as join_key=value")
        if name in integers:
            try:
                given.setdefault(name, []).append(int(value))
            except ValueError:
                raise LookupInvalid(f"--key {item!r}: {name} is int64, {value!r} is no whole number") from None
        else:
            given.setdefault(name, []).append(value)
    # A key that is given once holds for every row, as in the HTTP interface.
    return {name: values if len(values) > 1 else values * _row_count(given) for name, values in given.items()}


def _row_count(given: dict[str, list[Any]]) -> int:
    return max(len(values) for values in given.values())


def _rows(result: LookupResult, entities: dict[str, Any], now: datetime) -> list[dict[str, Any]]:
    """One row a key and feature."""
    values = {column.reference: column.to_arrow().to_pylist() for column in result.columns}
    rows = []
    for key in range(result.keys):
        identity = {name: column[key] for name, column in entities.items()}
        for column in result.columns:
            has_row = not _is_missing(column.rows.status[key])
            time_of_row = to_datetime(int(column.rows.event_time[key]))
            rows.append(
                {
                    **identity,
                    "feature": column.reference,
                    "value": values[column.reference][key],
                    "status": Status(column.status[key]).name,
                    "event_timestamp": time_of_row if has_row else None,
                    "age_seconds": round((now - time_of_row).total_seconds(), 3) if has_row else None,
                }
            )
    return rows


def _is_missing(status: int) -> bool:
    return status in (Status.NOT_FOUND, Status.UNAVAILABLE)


def _print_table(version: int, rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"version {version}", title_justify="left", box=None, pad_edge=False)
    for name in rows[0] if rows else ():
        table.add_column("age" if name == "age_seconds" else name, overflow="fold")
    for row in rows:
        cells = {**row, "age_seconds": age(row["age_seconds"])}
        table.add_row(*(_text(value) for value in cells.values()))
    _print(table)


def _print_histories(
    version: StoreVersion, entities: dict[str, Any], histories: dict[str, list[list[StoredRow]]]
) -> None:
    for view, keys in histories.items():
        found = version.view(view).record.low_watermark
        if found is not None:
            click.echo(
                f"\n{view}: low watermark {_text(found.at)}, set by {found.set_by.kind} {found.set_by.seq} "
                f"({found.set_by.id[:8]}): the source of all rows without an age of their own is at least so new"
            )
        names = [key.name for key in version.view(view).record.view_schema.join_keys]
        by_key = {
            tuple(f"{name}={entities[name][number]}" for name in names): history for number, history in enumerate(keys)
        }
        for key, history in by_key.items():
            click.echo(f"\n{view} {' '.join(key)}" + ("" if history else ": nothing of this key is stored"))
            for position, row in enumerate(history):
                when = "now" if position == 0 else "before"
                origin = f"{row.origin.kind} {row.origin.seq} ({row.origin.id[:8]})" if row.origin else "push"
                age_of = ", age of its own" if row.own_age else ""
                click.echo(
                    f"  {when:<6} {origin}, event time {_text(row.event_time)}{age_of}, in {row.place} {row.segment}"
                )
                older = history[position + 1] if position + 1 < len(history) else None
                click.echo(f"         {_change(row, older)}")


def _change(row: StoredRow, older: StoredRow | None) -> str:
    """A stored row in words: all of it if nothing older is there, else what it changed."""
    if row.values is None:
        return "tombstone: the key vanished from the source"
    before = older.values if older and older.values is not None else None
    if before is None:
        return ", ".join(f"{name}={_text(value)}" for name, value in row.values.items())
    changed = [
        f"{name}: {_text(before.get(name))} → {_text(value)}"
        for name, value in row.values.items()
        if value != before.get(name)
    ]
    return ", ".join(changed) or "the same values, a newer event time"


def _history_document(histories: dict[str, list[list[StoredRow]]]) -> dict[str, Any]:
    return {
        view: [
            [
                {
                    "origin": row.origin.model_dump() if row.origin else {"kind": "push"},
                    "place": row.place,
                    "segment": row.segment,
                    "event_timestamp": row.event_time,
                    "own_age": row.own_age,
                    "tombstone": row.values is None,
                    "values": row.values,
                }
                for row in history
            ]
            for history in keys
        ]
        for view, keys in histories.items()
    }


@click.command("status", short_help="Show what a store holds, how fresh it is, and who serves it.")
@STORE
@click.option("--json", "as_json", is_flag=True, help="Print it all as JSON.")
def status_command(store: Path, as_json: bool) -> None:
    """Show what a store holds, how fresh it is, and who serves it.

    Ends with 1 if a view does not move on, data of it is damaged, or the server acknowledges no pushes.
    """
    server = describe_server(store)
    # What a server that is gone left says nothing of now.
    standing = read_standing(store) if server is not None else None
    status = describe_version(FeatureStore.open(store).version(), standing)
    trouble = _trouble_of_writer(store) if server is not None else None
    status |= {"trouble": trouble, "live": describe_live(store), "scrub": describe_scrub(store), "server": server}
    if as_json:
        click.echo(json.dumps(status, indent=2))
    else:
        _print_status(status)
    if trouble or any(view["trouble"] or view["damage"] or view["damaged_kept"] for view in status["views"]):
        sys.exit(1)


def _trouble_of_writer(store: Path) -> dict[str, Any] | None:
    """Why the writer of a running server acknowledges nothing, where the store can be read all the same."""
    with suppress(WriterUnavailable):
        trouble: dict[str, Any] | None = asyncio.run(WriterClient(store).status()).get("trouble")
        return trouble
    return None


def _print_status(status: dict[str, Any]) -> None:
    free = size(status["live"]["disk_free_bytes"])
    shard = f", shard {status['shard']}" if status["shard"] else ""
    click.echo(f"version {status['version']}{shard}, loaded from {status['root']}; {free} free on its disk")
    loaded = [view for view in status["views"] if "base" in view]
    table = Table(box=None, pad_edge=False)
    for name in (
        "view",
        "seq",
        "base",
        "rows",
        "overlays",
        "overlay rows",
        "bytes",
        "freshness",
        "lag",
        "behind",
        "applied at",
    ):
        table.add_column(name, justify="left" if name in ("view", "base", "applied at") else "right")
    for view in loaded:
        base, overlays = view["base"], view["overlays"]
        table.add_row(
            view["name"],
            str(view["applied_seq"]),
            f"table {view['table']}" if view["table"] else base["id"] + (" (pinned)" if view["pinned"] else ""),
            f"{base['rows']:,}",
            str(len(overlays)),
            f"{sum(overlay['rows'] + overlay['tombstones'] for overlay in overlays):,}",
            size(view["bytes"]),
            age(view["freshness_seconds"]),
            age(view["lag_seconds"]),
            _behind(view["behind"]),
            view["applied_at"],
        )
    _print(table)
    for view in status["views"]:
        if damage := view["damage"]:
            click.echo(f"\n{view['name']} cannot be read: {damage}")
        if trouble := view["trouble"]:
            click.echo(
                f"\ntrouble with {view['name']} since {trouble['since']}: {trouble['code']}: {trouble['message']}"
            )
        for kept in view["damaged_kept"]:
            click.echo(
                f"\n{view['name']}: nobody can go back to the kept generation {kept['id']}, which was found damaged at "
                f"{kept['since']}: {kept['message']}"
            )
    if scrub := status["scrub"]:
        click.echo(f"\n{_scrub(scrub)}")
    if trouble := status["trouble"]:
        click.echo(f"\ntrouble with the store: {trouble['code']}: {trouble['message']}")
    if reader := status["live"]["oldest_reader"]:
        click.echo(
            f"\nprocess {reader['pid']} holds a version that is {reader['versions_behind']:,} behind: live/, "
            f"{size(status['live']['bytes'])}, keeps what it holds until it looks up again or ends"
        )
    server = status["server"]
    if server is None:
        click.echo("\nno server runs on this store")
        return
    click.echo(f"\nserved at {server['address']}")
    processes = Table(box=None, pad_edge=False)
    for name in ("process", "pid", "RSS", "PSS", "uptime"):
        processes.add_column(name, justify="left" if name == "process" else "right")
    for process in server["processes"]:
        numbers = (str(process["pid"]), size(process["rss"]), size(process["pss"]), age(process["uptime_seconds"]))
        processes.add_row(process["role"], *numbers)
    _print(processes)


def _scrub(scrub: dict[str, Any]) -> str:
    """How far the scrub of a store has come, in words."""
    suspect = scrub["suspect_chunks"]
    hurry = f"; {suspect:,} chunks are left to verify after an unclean shutdown" if suspect else ""
    within = f"{age(scrub['age_seconds'])} (asked for: {age(scrub['period_seconds'])})"
    found = f"{size(scrub['bytes_verified'])} verified, {scrub['damaged_chunks']:,} damaged chunks found"
    return f"scrub: every checksum was verified within the last {within}; {found}{hurry}"


def _behind(behind: dict[str, Any] | None) -> str:
    """How far a view is behind its root, in words; nothing where no server follows one."""
    if behind is None:
        return "-"
    if behind["entries"] == 0:
        return "0"
    return f"{behind['entries']:,}, {age(behind['seconds'])}" + (" (held)" if behind["held_by"] else "")


def _print(table: Table) -> None:
    # Output that goes to a file or a pipe is not folded to a terminal's width, nor filled up to it.
    console = Console(width=None if sys.stdout.isatty() else 400, highlight=False)
    with console.capture() as captured:
        console.print(table)
    click.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


def age(seconds: float | None) -> str:
    """A duration as people read it: two units at most."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.3g}s"
    units = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))
    parts, rest = [], int(seconds)
    for unit, length in units:
        if rest >= length:
            parts.append(f"{rest // length}{unit}")
            rest %= length
    return " ".join(parts[:2])


def size(count: int) -> str:
    """A number of bytes as people read it."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def _csv_value(value: Any) -> Any:
    if isinstance(value, list):
        return json.dumps(value, default=_json_value)
    return _text(value) if isinstance(value, datetime | bytes) else value


def _json_value(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if isinstance(value, bytes):
        return value.hex()
    raise TypeError(f"{type(value).__name__} has no JSON form")
