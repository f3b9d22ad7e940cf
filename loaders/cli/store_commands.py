"""The commands `shoal backup`, `shoal restore` and `shoal store`."""

from pathlib import Path
from typing import Any

import click

from shoal.engine.cli.status_command import STORE, LocalPath
from shoal.engine.cli.terminal import say, say_json, size
from shoal.loaders.backup.accepted_loss import accept_loss
from shoal.loaders.backup.backup import BackupManifest, back_up, restore

_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


@click.command("backup", short_help="Copy a store, even while a server runs on it.")
@STORE
@click.option("--to", "target", required=True, type=LocalPath(), metavar="DIR", help="The directory to create.")
@_JSON
def backup_command(store: Path, target: Path, as_json: bool) -> None:
    """Copy a store, even while a server runs on it: see docs/backup.md.

    The copy holds one version, is checked, and appears completely or not at all. Bases are hard-linked if the copy is
    on the same file system.
    """
    manifest = back_up(store, target)
    if as_json:
        say_json(_document(manifest))
    else:
        say(
            f"{target} holds version {manifest.version} of {store}: {len(manifest.views)} views, {size(manifest.bytes)}"
        )


@click.command("restore", short_help="Create a store from a backup.")
@click.option("--from", "source", required=True, type=LocalPath(), metavar="DIR", help="The result of `shoal backup`.")
@click.option("--to", "store", required=True, type=LocalPath(), metavar="DIR", help="The store to create.")
@_JSON
def restore_command(source: Path, store: Path, as_json: bool) -> None:
    """Create a store from a backup: see docs/backup.md. The backup is checked, and is not changed.

    An existing store is not overwritten: move it away first. The new store lacks data that was written after the
    backup; a server that follows an export root applies the entries published since.
    """
    manifest = restore(source, store)
    if as_json:
        say_json(_document(manifest))
    else:
        made = manifest.created_at.isoformat(timespec="seconds")
        say(f"{store} is at version {manifest.version}, from the backup of {made}")


def _document(manifest: BackupManifest) -> dict[str, Any]:
    return {"version": manifest.version, "bytes": manifest.bytes, "views": manifest.views}


@click.group("store", short_help="Make decisions that only a store's owner may make.")
def store_command() -> None:
    """Make decisions that only a store's owner may make."""


@store_command.command("accept-loss", short_help="Reset a store that lost data.")
@STORE
@_JSON
def accept_loss_command(store: Path, as_json: bool) -> None:
    """Reset a store that lost data.

    Moves the remaining files into the store's directory `lost`, and deletes nothing. The next `shoal load` or
    `shoal serve` loads the published entries again. Data that was only written to this store is lost, unless a backup
    has it. Refuses if the store has everything that it recorded.
    """
    loss = accept_loss(store)
    recorded = str(loss.recorded) if loss.recorded is not None else "nothing: an earlier release wrote the store last"
    if as_json:
        document = {"recorded": recorded, "found": loss.found, "moved_to": str(loss.moved_to)}
        say_json(document)
    else:
        say(f"recorded: {recorded}\nfound: {loss.found}\nmoved to: {loss.moved_to}")
        say(f"{store} starts empty at the next `shoal load` or `shoal serve`")
