"""Reload a view on request: read its log at once, go back to a kept generation, or follow the log again."""

from contextlib import suppress
from typing import Any

import pydantic

from shoal.engine.base.errors import LookupInvalid, ManifestInvalid, NotPublished, ShoalError
from shoal.engine.process.control import error_document
from shoal.engine.root.export_root import ExportRoot
from shoal.loaders.apply.definition import follow_drops
from shoal.loaders.apply.entries import follow_again, roll_back
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.follow.load import AppliedEntry, Observer, catch_up


class ReloadOrder(pydantic.BaseModel):
    """A request to reload all views or one view. A request for one view may name a kept generation to go back to."""

    model_config = pydantic.ConfigDict(extra="forbid")
    view: str | None = None
    snapshot: str | None = None
    accept_schema_change: bool = False


def views_to_reload(writer: StoreWriter, root: ExportRoot | None, request: ReloadOrder) -> list[str]:
    """Return the views to reload. Views that the root dropped are removed from the store first.

    Raises:
        LookupInvalid: the request names a snapshot without a view.
        NotPublished: the root is gone.
    """
    if request.snapshot is not None:
        if request.view is None:
            raise LookupInvalid("the request names a snapshot without a view; name the view too")
        return [request.view]
    if root is not None:
        with suppress(ManifestInvalid, OSError):
            follow_drops(writer, root)
    if request.view is not None:
        return [request.view]
    if root is None:
        return []
    root.check_exists()
    return root.views()


def reload_or_tell(
    writer: StoreWriter, root: ExportRoot | None, view: str, request: ReloadOrder, observer: Observer
) -> dict[str, Any]:
    """Reload one view as `reload_view` does. If the request is for all views and this one fails, return its error
    instead of raising it, so that the other views are still reloaded."""
    try:
        return reload_view(writer, root, view, request, observer)
    except ShoalError as error:
        if request.view is not None:
            raise
        return {"view": view} | error_document(error)


def reload_view(
    writer: StoreWriter, root: ExportRoot | None, view: str, request: ReloadOrder, observer: Observer
) -> dict[str, Any]:
    """Reload one view, and return its new state.

    If the request names a snapshot, the view goes back to that generation and is pinned to it. If the request names
    only the view, the view is unpinned and catches up with its log. If the request is for all views, the view catches
    up unless it is pinned.

    Raises:
        NotPublished: neither the root nor the store has the view, or there is no root to load from.
        GenerationNotKept: this node does not keep the requested generation.
        ShoalError: a published entry cannot be applied; the view keeps its last version.
    """
    applied: list[AppliedEntry] = []
    if request.snapshot is not None:
        roll_back(writer, view, request.snapshot)
    else:
        if root is None:
            raise NotPublished("there is no export root to load from; give one with --from ROOT")
        if writer.record(view) is None and view not in root.views():
            raise NotPublished(f"neither the store nor {root} has a view {view!r}")
        if request.view is not None:
            follow_again(writer, view)
        applied = catch_up(writer, root, view, observer, accept_schema_change=request.accept_schema_change)
    record = writer.version().view(view).record
    return {
        "view": view,
        "generation": record.base.id,
        "applied_seq": record.applied_seq,
        "pinned": record.pinned,
        "applied": [{"kind": entry.kind, "seq": entry.seq, "rows": entry.rows} for entry in applied],
    }
