"""The commands `shoal load`, `shoal reload` and `shoal verify`."""

import asyncio
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from shoal.engine.base.errors import (
    NotPublished,
    SettingsInvalid,
    ShoalError,
    StoreLocked,
    StoreNotFound,
)
from shoal.engine.base.shards import Shard
from shoal.engine.cli.status_command import STORE
from shoal.engine.cli.terminal import say, say_json, size, visible
from shoal.engine.format.paths import check_may_be_store, is_store
from shoal.engine.process.control import WriterClient, first_failure
from shoal.engine.root.export_root import ExportRoot
from shoal.loaders.apply.compaction import fold, should_fold
from shoal.loaders.backup.verify import verify
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.follow.load import AppliedEntry, load
from shoal.loaders.follow.plan import ApplyDelta, LoadSnapshot
from shoal.loaders.follow.reload import ReloadOrder, reload_or_tell, views_to_reload

ACCEPT_SCHEMA_CHANGE = click.option(
    "--accept-schema-change", is_flag=True, help="Load a snapshot even if its features changed incompatibly."
)


def _shard(_context: click.Context, _parameter: click.Parameter, value: str | None) -> Shard | None:
    try:
        return Shard.parse(value) if value is not None else None
    except SettingsInvalid as error:
        raise click.BadParameter(str(error)) from None


SHARD = click.option(
    "--shard",
    callback=_shard,
    metavar="I/N",
    help="Hold only the rows of shard I of N: see docs/shards.md. Only for a new store, which keeps its shard.",
)


class TerminalObserver:
    """Shows the progress of a load on stderr: one bar per step on a terminal, otherwise one line per step."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("rows"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=quiet or not self._console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> "TerminalObserver":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def started(self, step: LoadSnapshot | ApplyDelta) -> Callable[[int], None]:
        manifest = step.manifest
        name = manifest.snapshot_id if isinstance(step, LoadSnapshot) else f"delta {manifest.seq}"
        task = self._task = self._bars.add_task(
            f"{manifest.view.name} {name}", total=manifest.rows + manifest.tombstones
        )
        return lambda rows: self._bars.advance(task, rows)

    def finished(self, applied: AppliedEntry) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
        if not self._quiet and applied.kind == "drop":
            self._console.print(f"{applied.view}: removed, as the root dropped it at seq {applied.seq}")
        elif not self._quiet:
            changes = f"{applied.rows:,} rows" + (f", {applied.tombstones:,} tombstones" if applied.tombstones else "")
            self._console.print(f"{applied.view}: {applied.kind} {applied.seq}: {changes} in {applied.seconds:.2f} s")

    def failed(self, view: str, error: ShoalError) -> None:
        # The command ends with only one error. This prints the error of each view.
        if not self._quiet:
            self._console.print(visible(f"{view}: {error}"), style="red")


@click.command("load", short_help="Bring a store up to date with an export root.")
@STORE
@click.option("--from", "address", metavar="ROOT", help="The export root: a directory, or s3://BUCKET/PREFIX.")
@click.option("--from-dynamodb", "table", metavar="TABLE", help="Load a table of `shoal sync-dynamodb` instead.")
@click.option("--view", "views", multiple=True, metavar="NAME", help="Only this view; may be repeated.")
@SHARD
@ACCEPT_SCHEMA_CHANGE
@click.option("--json", "as_json", is_flag=True, help="Print the applied entries as JSON.")
def load_command(
    store: Path,
    address: str | None,
    table: str | None,
    views: tuple[str, ...],
    shard: Shard | None,
    accept_schema_change: bool,
    as_json: bool,
) -> None:
    """Bring a store up to date with an export root: snapshots, then deltas.

    Entries that the store already has are not loaded again. An interrupted load continues where it stopped. A store
    that holds a shard keeps it, with or without --shard. A table is loaded completely; its view is then kept on this
    node until a later entry of its log says otherwise.
    """
    if (address is None) == (table is None):
        raise click.UsageError("give either --from or --from-dynamodb")
    if table is not None:
        if views or accept_schema_change:
            raise click.UsageError("--view and --accept-schema-change can only be used with --from")
        _load_table(store, table, as_json)
        return
    assert address is not None
    # Check this first: if the two paths are swapped, the missing root must not be created.
    check_may_be_store(store)
    root = ExportRoot(address)
    root.check_exists()
    applied: list[AppliedEntry] = []
    with StoreWriter(store, shard=shard) as writer, TerminalObserver(quiet=as_json) as observer:
        try:
            applied = load(writer, root, observer, views=views, accept_schema_change=accept_schema_change)
        finally:
            for view, version in writer.version().views.items():
                if should_fold(version.record):
                    fold(writer, view)
        version_id = writer.version().id
    if as_json:
        say_json({"version": version_id, "applied": [asdict(entry) for entry in applied]})
    elif not applied:
        say(f"{store} has everything that {root} has (version {version_id})")
    else:
        say(f"{store} is at version {version_id}: {len(applied)} entries applied")


def _load_table(store: Path, table: str, as_json: bool) -> None:
    from shoal.loaders.dynamodb.bring_local import load_table

    started = monotonic()
    with StoreWriter(store) as writer:
        progress, rows = asyncio.run(load_table(writer, table, lambda rows: None))
        version_id = writer.version().id
    view = progress.view.name
    seconds = monotonic() - started
    if as_json:
        applied = AppliedEntry(view, "snapshot", progress.seq, rows, 0, seconds, f"it was loaded from table {table!r}")
        say_json({"version": version_id, "applied": [asdict(applied)]})
    else:
        say(f"{store} is at version {version_id}: {view} has {rows:,} rows of table {table}, at seq {progress.seq}")


@click.command("reload", short_help="Load new entries at once, or go back to a kept generation.")
@STORE
@click.option("--view", metavar="NAME", help="Only this view; it follows its log again if it was rolled back.")
@click.option("--snapshot", metavar="ID", help="Go back to this kept generation of the view, and stay there.")
@click.option("--from", "address", metavar="ROOT", help="The export root, if no server runs.")
@ACCEPT_SCHEMA_CHANGE
@click.option("--json", "as_json", is_flag=True, help="Print the state of the views as JSON.")
def reload_command(
    store: Path,
    view: str | None,
    snapshot: str | None,
    address: str | None,
    accept_schema_change: bool,
    as_json: bool,
) -> None:
    """Load new entries at once, or go back to a kept generation (`shoal status --json` lists them).

    If a server runs on the store, the server does this; otherwise the command does it itself. If a view fails, the
    others are still reloaded, and the command then ends with the error of that view.
    """
    request = ReloadOrder(view=view, snapshot=snapshot, accept_schema_change=accept_schema_change)
    check_may_be_store(store)
    if not is_store(store):
        raise StoreNotFound(f"{store} is not a Shoal store; `shoal load --store {store} --from ROOT` makes one")
    try:
        with StoreWriter(store) as writer, TerminalObserver(quiet=as_json) as observer:
            known = writer.version().store.root
            followed = address or known
            root = ExportRoot(followed) if followed else None
            names = views_to_reload(writer, root, request)
            answers = [reload_or_tell(writer, root, name, request, observer) for name in names]
    except StoreLocked:
        client = WriterClient(store)
        answer = asyncio.run(client.reload(view, snapshot=snapshot, accept_schema_change=accept_schema_change))
        answers = answer["views"]
    if as_json:
        say_json({"views": answers})
    else:
        for answer in answers:
            say(_where(answer))
    if (error := first_failure(answers)) is not None:
        raise error


def _where(answer: dict[str, Any]) -> str:
    if "error" in answer:
        return f"{answer['view']}: failed: {answer['error']['code']}: {answer['error']['message']}"
    pinned = ", pinned: `shoal reload --view` unpins it" if answer["pinned"] else ""
    return (
        f"{answer['view']}: at seq {answer['applied_seq']} on {answer['generation']}, "
        f"{len(answer['applied'])} entries applied{pinned}"
    )


@click.command("verify", short_help="Check a whole export root or store.")
@click.argument("address", metavar="ROOT|STORE")
@click.option("--json", "as_json", is_flag=True, help="Print every check as JSON.")
def verify_command(address: str, as_json: bool) -> None:
    """Check a whole export root or store: checksums, order, counts, lineage.

    Exits with 1 if anything is bad.
    """
    checks = []
    for checked in verify(address):
        checks.append(checked)
        if not as_json:
            found = checked.problem or f"{checked.rows:,} rows, {size(checked.bytes)}"
            say(f"{'BAD ' if checked.problem else 'ok  '} {checked.what}: {found}")
    if not checks:
        raise NotPublished(f"{address} has nothing to check")
    bad = sum(1 for checked in checks if checked.problem)
    if as_json:
        say_json({"bad": bad, "checks": [asdict(checked) for checked in checks]})
    else:
        say(f"{len(checks)} checks, {bad} bad")
    if bad:
        sys.exit(1)
