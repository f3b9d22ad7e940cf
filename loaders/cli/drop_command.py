"""The command `shoal drop-view`."""

import asyncio
from contextlib import suppress
from pathlib import Path

import click

from shoal.engine.base.errors import (
    NotPublished,
    RootUnreadable,
    StoreLocked,
    StoreNotFound,
    ViewInUse,
)
from shoal.engine.cli.terminal import say
from shoal.engine.format.paths import is_store
from shoal.engine.process.control import WriterClient
from shoal.engine.root.export_root import ExportRoot
from shoal.loaders.apply.definition import drop_view
from shoal.loaders.commit.store_writer import StoreWriter


@click.command("drop-view", short_help="Remove a view from an export root, or from one store.")
@click.argument("view")
@click.option("--root", "address", metavar="ROOT", help="The export root: a directory, or s3://BUCKET/PREFIX.")
@click.option("--store", type=click.Path(path_type=Path), metavar="DIR", help="A store instead, served or not.")
def drop_view_command(view: str, address: str | None, store: Path | None) -> None:
    """Remove a view from an export root, or from one store.

    First remove the view from views.yaml, and run `shoal export`: a view that a feature service of the root names is
    not dropped. Each node that follows the root then removes the view, with all rows pushed to it, at its next poll or
    load. If a drop is interrupted, run the same command again. A view of this name may be exported again later.

    With --store, the root of the store must not have the view: the store would load it again.
    """
    if (address is None) == (store is None):
        raise click.UsageError("give either --root or --store")
    if address is not None:
        _drop_from_root(ExportRoot(address), view)
    elif store is not None:
        _drop_from_store(store, view)


def _drop_from_root(root: ExportRoot, view: str) -> None:
    root.check_exists()
    references = {service.name: service.features for service in root.services()}
    naming = [name for name, features in references.items() if any(each.startswith(f"{view}:") for each in features)]
    if naming:
        raise ViewInUse(
            f"the feature services {', '.join(naming)} of {root} name view {view!r}; remove it from them in "
            f"views.yaml, run `shoal export`, and then drop the view"
        )
    seq = root.drop_view(view)
    say(
        f"{root}: dropped view {view}, whose last seq is {seq}; nodes remove it at their next poll, with all rows "
        "that were pushed to it"
    )


def _drop_from_store(store: Path, view: str) -> None:
    if not is_store(store):
        raise StoreNotFound(f"{store} is not a Shoal store; give the directory of a store")
    try:
        with StoreWriter(store) as writer:
            _check_is_not_published(store, view, writer.version().store.root)
            drop_view(writer, view)
    except StoreLocked:
        client = WriterClient(store)
        _check_is_not_published(store, view, asyncio.run(client.status())["root"])
        asyncio.run(client.drop_view(view))
    say(f"{store}: removed view {view}")


def _check_is_not_published(store: Path, view: str, followed: str | None) -> None:
    with suppress(NotPublished, RootUnreadable, OSError):
        if followed is not None and view in ExportRoot(followed).views():
            raise ViewInUse(
                f"{followed} publishes view {view!r}, so {store} would load it again; drop it from the root: "
                f"`shoal drop-view {view} --root {followed}`"
            )
