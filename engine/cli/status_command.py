"""The command `shoal status`, which reads a store directly, and the option `--store` for all commands."""

import asyncio
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from shoal.engine.base.errors import StoreDamaged, StoreNotFound, WriterUnavailable
from shoal.engine.cli.terminal import age, say, say_json, size, table
from shoal.engine.feature_store import FeatureStore
from shoal.engine.lookup.live_keys import live_keys
from shoal.engine.process.control import WriterClient, error_in
from shoal.engine.root.storage import is_address
from shoal.engine.status.live import describe_live
from shoal.engine.status.processes import describe_server
from shoal.engine.status.replication import read_replication
from shoal.engine.status.scrubbed import describe_scrub
from shoal.engine.status.store import describe_version
from shoal.engine.store.version import StoreVersion


class LocalPath(click.Path):
    """A path on this machine. Rejects an address such as s3://BUCKET, which would name a local directory `s3:`."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and is_address(value):
            self.fail(f"{value!r} is an address; give the path of a directory on this machine", param, ctx)
        try:
            os.stat(value)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR):
                self.fail(f"{value!r} cannot be a directory: {error.strerror}", param, ctx)
        return super().convert(value, param, ctx)


STORE = click.option("--store", required=True, type=LocalPath(), metavar="DIR", help="The directory of the store.")


@click.command("status", short_help="Show what a store holds, how fresh it is, and who serves it.")
@STORE
@click.option("--json", "as_json", is_flag=True, help="Print the full status as JSON.")
def status_command(store: Path, as_json: bool) -> None:
    """Show what a store holds, how fresh it is, and who serves it.

    For each view, "keys" is the exact number of keys that have a row, and "rows" is the number of stored rows: a key
    has one in the base and one in each overlay that changed it. "Lag" is the number of entries of the export root that
    are not applied, and the time since the oldest of them was published; "-" if no server follows a root.

    The exit code is 1 if a view does not advance, data of a view is damaged, or the server acknowledges no pushes.
    """
    server = describe_server(store)
    # The status that a dead server left behind is out of date.
    standing = read_replication(store) if server is not None else None
    version = _version(store, is_served=server is not None)
    status = describe_version(version, standing)
    for view in status["views"]:
        if view["name"] in version.views:
            view["keys"] = live_keys(version.views[view["name"]])
    trouble = _trouble_of_writer(store) if server is not None else None
    status |= {"trouble": trouble, "live": describe_live(store), "scrub": describe_scrub(store), "server": server}
    if as_json:
        say_json(status)
    else:
        _print_status(status)
    if trouble or any(view["trouble"] or view["damage"] or view["damaged_kept"] for view in status["views"]):
        sys.exit(1)


def _version(store: Path, *, is_served: bool) -> StoreVersion:
    """Return the newest version. If it cannot be read and a server runs, raise the error of the server's writer: only
    the writer knows whether the store was moved. Other processes only see that files are missing."""
    try:
        return FeatureStore.open(store).version()
    except (StoreNotFound, StoreDamaged):
        if trouble := _trouble_of_writer(store) if is_served else None:
            raise error_in({"error": trouble}) from None
        if store.exists():
            raise
        raise StoreNotFound(
            f"{store} does not exist; if a server of this store runs, the store was moved or deleted while it ran: "
            f"move it back. To create a new store, run `shoal load --store {store} --from ROOT`"
        ) from None


def _trouble_of_writer(store: Path) -> dict[str, Any] | None:
    """Return the reason why the writer of a running server acknowledges no pushes; None if there is no such reason. The
    store may still be readable."""
    with suppress(WriterUnavailable):
        trouble: dict[str, Any] | None = asyncio.run(WriterClient(store).status()).get("trouble")
        return trouble
    return None


def _print_status(status: dict[str, Any]) -> None:
    free = size(status["live"]["disk_free_bytes"])
    shard = f", shard {status['shard']}" if status["shard"] else ""
    say(f"version {status['version']}{shard}, loaded from {status['root']}; {free} free on its disk")
    names = ("view", "seq", "base", "keys", "rows", "overlays", "bytes", "freshness", "lag", "applied at")
    columns = [(name, name not in ("view", "base", "applied at")) for name in names]
    table(columns, (_view_cells(view) for view in status["views"] if "base" in view))
    for line in _notes(status):
        say(f"\n{line}")
    _print_server(status["server"])


def _notes(status: dict[str, Any]) -> Iterator[str]:
    """Yield one paragraph for each thing that an operator must know about a store."""
    for view in status["views"]:
        if damage := view["damage"]:
            yield f"{view['name']} cannot be read: {damage}"
        if trouble := view["trouble"]:
            yield f"trouble with {view['name']} since {trouble['since']}: {trouble['code']}: {trouble['message']}"
        for kept in view["damaged_kept"]:
            yield (
                f"{view['name']}: nobody can go back to the kept generation {kept['id']}, which was found damaged at "
                f"{kept['since']}: {kept['message']}"
            )
    if scrub := status["scrub"]:
        yield _scrub(scrub)
    if trouble := status["trouble"]:
        yield f"trouble with the store: {trouble['code']}: {trouble['message']}"
    if reader := status["live"]["oldest_reader"]:
        yield (
            f"process {reader['pid']} holds a version that is {reader['versions_behind']:,} behind: live/ "
            f"({size(status['live']['bytes'])}) cannot reuse its old pages until the process looks up again or ends"
        )


def _print_server(server: dict[str, Any] | None) -> None:
    if server is None:
        say("\nno server runs on this store")
        return
    say(f"\nserved at {server['address']}")
    columns = [("process", False), ("pid", True), ("RSS", True), ("PSS", True), ("uptime", True)]
    table(columns, (_process_cells(process) for process in server["processes"]))


def _process_cells(process: dict[str, Any]) -> tuple[str, ...]:
    sizes = size(process["rss"]), size(process["pss"])
    return process["role"], str(process["pid"]), *sizes, age(process["uptime_seconds"])


def _view_cells(view: dict[str, Any]) -> tuple[str, ...]:
    return (
        view["name"],
        str(view["applied_seq"]),
        f"table {view['table']}" if view["table"] else view["base"]["id"] + (" (pinned)" if view["pinned"] else ""),
        f"{view['keys']:,}" if view["keys"] is not None else "-",
        f"{view['rows']:,}",
        str(len(view["overlays"])),
        size(view["bytes"]),
        age(view["freshness_seconds"]),
        _lag(view),
        view["applied_at"],
    )


def _scrub(scrub: dict[str, Any]) -> str:
    """Describe the progress of a store's scrub in words."""
    suspect = scrub["suspect_chunks"]
    hurry = f"; {suspect:,} chunks are left to verify after an unclean shutdown" if suspect else ""
    within = f"{age(scrub['age_seconds'])} (target: {age(scrub['period_seconds'])})"
    found = f"{size(scrub['bytes_verified'])} verified, {scrub['damaged_chunks']:,} damaged chunks found"
    return f"scrub: every checksum was verified within the last {within}; {found}{hurry}"


def _lag(view: dict[str, Any]) -> str:
    """Describe a view's lag behind its root in words; "-" if no server follows a root."""
    if view["lag_entries"] is None:
        return "not in root" if view["in_root"] is False else "-"
    if view["lag_entries"] == 0:
        return "0"
    return f"{view['lag_entries']:,}, {age(view['lag_seconds'])}" + (" (held)" if view["held_by"] else "")
