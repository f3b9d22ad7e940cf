"""The command `shoal lookup`: it reads a store directly, with or without a server."""

import csv
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import click

from shoal.engine.base.durations import parse_duration
from shoal.engine.base.times import to_datetime
from shoal.engine.cli.status_command import STORE
from shoal.engine.cli.terminal import age, cell, plain, say, say_json, table
from shoal.engine.feature_store import FeatureStore
from shoal.engine.format.schema import split_reference
from shoal.engine.kernels.gathering import Status
from shoal.engine.lookup.columns import Stale, resolve_features
from shoal.engine.lookup.explain import StoredRow, explain
from shoal.engine.lookup.given_keys import given_keys, join_key_types
from shoal.engine.lookup.result import LookupResult
from shoal.engine.status.store import describe_low_watermark
from shoal.engine.store.version import StoreVersion

_Row = dict[str, Any]


def _duration(_context: click.Context, _parameter: click.Parameter, value: str | None) -> timedelta | None:
    try:
        return parse_duration(value) if value is not None else None
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.command("lookup", short_help="Look up features of some keys, and show their origin.")
@STORE
@click.option("--features", metavar="VIEW:FEATURE,…", help="The features to look up; VIEW:* means all of a view.")
@click.option("--service", metavar="NAME", help="Look up the features of this feature service instead.")
@click.option(
    "--key", "keys", multiple=True, required=True, metavar="KEY=VALUE", help="A join key; repeat it for more rows."
)
@click.option("--max-age", callback=_duration, metavar="AGE", help="Accept rows up to this age, instead of the TTL.")
@click.option("--stale", type=click.Choice(get_args(Stale)), default="null", show_default=True, help="For older rows.")
@click.option("--format", "form", type=click.Choice(["table", "json", "csv"]), default="table", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
@click.option("--explain", "explained", is_flag=True, help="Show what wrote each row, and its history.")
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

    Reads the store directly, whether or not a server runs. JSON output matches the server's JSON: bytes in base64, NaN
    and infinities as null. CSV and the table write NaN, Infinity and -Infinity. On a terminal, and
    in the table, characters that cannot be printed are shown as escapes, such as \\x1b.
    """
    if (features is None) == (service is None):
        raise click.UsageError("give either --features or --service")
    if explained and form == "csv":
        raise click.UsageError("--explain does not work with CSV; use --format table or json")
    opened = FeatureStore.open(store)
    version = opened.version()
    asked = service if service is not None else [part.strip() for part in (features or "").split(",") if part.strip()]
    entities = given_keys(keys, _key_types(version, asked))
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
        say_json(document)
    elif form == "csv":
        writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        # A file or pipe gets the exact text; on a terminal, control characters are escaped.
        text_of = cell if sys.stdout.isatty() else plain
        writer.writerows({name: "" if value is None else text_of(value) for name, value in row.items()} for row in rows)
    else:
        _print_table(result.version, rows)
        _print_histories(version, entities, histories)


def _key_types(version: StoreVersion, asked: str | list[str]) -> dict[str, str]:
    """Return the join keys of the requested views. Other views may have join keys with the same names but other
    types."""
    views = dict.fromkeys(split_reference(reference)[0] for reference in resolve_features(version, asked))
    return join_key_types(version.view(view).record.view_schema for view in views)


def _rows(result: LookupResult, entities: Mapping[str, list[Any]], now: datetime) -> list[_Row]:
    """Return one row per key and feature."""
    values = {column.reference: column.to_pylist(shortest=True) for column in result.columns}
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


def _print_table(version: int, rows: list[_Row]) -> None:
    columns = [("age" if name == "age_seconds" else name, False) for name in rows[0]] if rows else []
    cells = ([cell(value) for value in ({**row, "age_seconds": age(row["age_seconds"])}).values()] for row in rows)
    table(columns, cells, title=f"version {version}")


def _print_histories(
    version: StoreVersion, entities: Mapping[str, list[Any]], histories: Mapping[str, list[list[StoredRow]]]
) -> None:
    for view, keys in histories.items():
        found = version.view(view).record.low_watermark
        if found is not None:
            say(
                f"\n{view}: low watermark {cell(found.at)}, set by {found.set_by.kind} {found.set_by.seq} "
                f"({found.set_by.id[:8]}): each row without its own age is at least this new"
            )
        names = [key.name for key in version.view(view).record.view_schema.join_keys]
        by_key = {
            tuple(f"{name}={cell(entities[name][number])}" for name in names): history
            for number, history in enumerate(keys)
        }
        for key, history in by_key.items():
            say(f"\n{view} {' '.join(key)}" + ("" if history else ": nothing of this key is stored"))
            for line in _history_lines(history):
                say(line)


def _history_lines(history: list[StoredRow]) -> Iterable[str]:
    for position, row in enumerate(history):
        when = "now" if position == 0 else "before"
        origin = f"{row.origin.kind} {row.origin.seq} ({row.origin.id[:8]})" if row.origin else "push"
        age_of = ", age of its own" if row.own_age else ""
        yield f"  {when:<6} {origin}, event time {cell(row.event_time)}{age_of}, in {row.place} {row.segment}"
        older = history[position + 1] if position + 1 < len(history) else None
        yield f"         {_change(row, older)}"


def _change(row: StoredRow, older: StoredRow | None) -> str:
    """Describe a stored row: all of it if there is no older row, otherwise only its changes."""
    if row.values is None:
        return f"tombstone: {_removal(row)}"
    before = older.values if older and older.values is not None else None
    if before is None:
        return ", ".join(f"{name}={cell(value)}" for name, value in row.values.items())
    changed = [
        f"{name}: {cell(before.get(name))} → {cell(value)}"
        for name, value in row.values.items()
        if value != before.get(name)
    ]
    return ", ".join(changed) or "the same values, a newer event time"


def _removal(row: StoredRow) -> str:
    """Say what removed a key."""
    if row.origin is None:
        return "a push deleted the key"
    if row.origin.kind == "snapshot":
        # Snapshots have no tombstones. This tombstone represents a row that an older snapshot has and the base lacks.
        return "the key was in this snapshot, and not in a later one"
    return "the key vanished from the source"


def _history_document(histories: Mapping[str, list[list[StoredRow]]]) -> dict[str, Any]:
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
