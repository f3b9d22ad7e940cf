"""The commands `shoal backup`, `shoal restore` and `shoal store`."""

from pathlib import Path
from typing import Any

import click

from engine.commands import STORE, LocalPath
from engine.terminal import say, say_json, size
from loaders.accepted_loss import accept_loss
from loaders.backup import BackupManifest, back_up, restore

_JSON = click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")


@click.command("backup", short_help="Copy a store, also while a server runs on it.")
@STORE
@click.option("--to", "target", required=True, type=LocalPath(), metavar="DIR", help="A directory to be made.")
@_JSON
def backup_command(store: Path, target: Path, as_json: bool) -> None:
    """Copy a store, also while a server runs on it: see docs/backup.md.

    The copy holds one version, is checked, and appears whole or not at all. Bases are linked on the same file system.
    """
    manifest = back_up(store, target)
    if as_json:
        say_json(_document(manifest))
    else:
        say(
            f"{target} holds version {manifest.version} of {store}: {len(manifest.views)} views, {size(manifest.bytes)}"
        )


@click.command("restore", short_help="Make a store of a backup.")
@click.option("--from", "source", required=True, type=LocalPath(), metavar="DIR", help="What `shoal backup` made.")
@click.option("--to", "store", required=True, type=LocalPath(), metavar="DIR", help="The store to be made.")
@_JSON
def restore_command(source: Path, store: Path, as_json: bool) -> None:
    """Make a store of a backup, which is checked and stays as it is: see docs/backup.md.

    A store that exists is not touched: move it away first. What was written after the backup is not in it; a server
    that follows an export root applies what was published since.
    """
    manifest = restore(source, store)
    if as_json:
        say_json(_document(manifest))
    else:
        made = manifest.created_at.isoformat(timespec="seconds")
        say(f"{store} is at version {manifest.version}, as it was backed up at {made}")


def _document(manifest: BackupManifest) -> dict[str, Any]:
    return {"version": manifest.version, "bytes": manifest.bytes, "views": manifest.views}


@click.group("store", short_help="What only the owner of a store may decide.")
def store_command() -> None:
    """What only the owner of a store may decide."""


@store_command.command("accept-loss", short_help="Reset a store that lost data.")
@STORE
@_JSON
def accept_loss_command(store: Path, as_json: bool) -> None:
    """Reset a store that lost data.

    Moves what is left of it into its directory `lost`, and deletes nothing. What an export root published is loaded
    again by the next `shoal load` or `shoal serve`; what was only written to this store is lost, unless a backup has
    it. Refuses if the store has all that it recorded.
    """
    loss = accept_loss(store)
    recorded = str(loss.recorded) if loss.recorded is not None else "nothing: it was last written by an earlier release"
    if as_json:
        document = {"recorded": recorded, "found": loss.found, "moved_to": str(loss.moved_to)}
        say_json(document)
    else:
        say(f"recorded: {recorded}\nfound: {loss.found}\nmoved to: {loss.moved_to}")
        say(f"{store} begins anew with the next `shoal load` or `shoal serve`")
