"""The command `shoal status`, which reads a store directly, and the option by which commands name a store."""

import asyncio
import errno
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from engine.control import WriterClient, error_in
from engine.errors import StoreDamaged, StoreNotFound, WriterUnavailable
from engine.feature_store import FeatureStore
from engine.live_keys import live_keys
from engine.live_status import describe_live
from engine.processes import describe_server
from engine.scrubbed import describe_scrub
from engine.standing import read_standing
from engine.status import describe_version
from engine.storage import is_address
from engine.terminal import age, say, say_json, size, table
from engine.version import StoreVersion


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
@click.option("--json", "as_json", is_flag=True, help="Print it all as JSON.")
def status_command(store: Path, as_json: bool) -> None:
    """Show what a store holds, how fresh it is, and who serves it.

    For each view, "keys" is the exact number of keys that have a row, and "rows" the number of rows stored: a key has
    one in the base and one in each overlay that changed it. "Lag" is the number of entries of the export root that are
    not applied, and the time since the oldest of them was published; "-" if no server follows a root.

    Ends with 1 if a view does not move on, data of it is damaged, or the server acknowledges no pushes.
    """
    server = describe_server(store)
    # What a server that is gone left says nothing of now.
    standing = read_standing(store) if server is not None else None
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
    """Return the newest version. If it cannot be read and a server runs, raise the error of the server's writer: the
    writer knows whether the store was moved, and other processes only find no files."""
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
    """Why the writer of a running server acknowledges nothing, where the store can be read all the same."""
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
    for view in status["views"]:
        if damage := view["damage"]:
            say(f"\n{view['name']} cannot be read: {damage}")
        if trouble := view["trouble"]:
            say(f"\ntrouble with {view['name']} since {trouble['since']}: {trouble['code']}: {trouble['message']}")
        for kept in view["damaged_kept"]:
            say(
                f"\n{view['name']}: nobody can go back to the kept generation {kept['id']}, which was found damaged at "
                f"{kept['since']}: {kept['message']}"
            )
    if scrub := status["scrub"]:
        say(f"\n{_scrub(scrub)}")
    if trouble := status["trouble"]:
        say(f"\ntrouble with the store: {trouble['code']}: {trouble['message']}")
    if reader := status["live"]["oldest_reader"]:
        say(
            f"\nprocess {reader['pid']} holds a version that is {reader['versions_behind']:,} behind: live/, "
            f"{size(status['live']['bytes'])}, keeps what it holds until it looks up again or ends"
        )
    server = status["server"]
    if server is None:
        say("\nno server runs on this store")
        return
    say(f"\nserved at {server['address']}")
    processes = (
        (
            process["role"],
            str(process["pid"]),
            size(process["rss"]),
            size(process["pss"]),
            age(process["uptime_seconds"]),
        )
        for process in server["processes"]
    )
    table([("process", False), ("pid", True), ("RSS", True), ("PSS", True), ("uptime", True)], processes)


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
    """How far the scrub of a store has come, in words."""
    suspect = scrub["suspect_chunks"]
    hurry = f"; {suspect:,} chunks are left to verify after an unclean shutdown" if suspect else ""
    within = f"{age(scrub['age_seconds'])} (asked for: {age(scrub['period_seconds'])})"
    found = f"{size(scrub['bytes_verified'])} verified, {scrub['damaged_chunks']:,} damaged chunks found"
    return f"scrub: every checksum was verified within the last {within}; {found}{hurry}"


def _lag(view: dict[str, Any]) -> str:
    """How far a view is behind its root, in words; nothing where no server follows one."""
    if view["lag_entries"] is None:
        return "not in root" if view["in_root"] is False else "-"
    if view["lag_entries"] == 0:
        return "0"
    return f"{view['lag_entries']:,}, {age(view['lag_seconds'])}" + (" (held)" if view["held_by"] else "")
