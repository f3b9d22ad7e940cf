"""Reload a view by order: look for news at once, go back to a kept generation, or go on again after that."""

from contextlib import suppress
from typing import Any

import pydantic

from engine.control import error_document
from engine.errors import LookupInvalid, ManifestInvalid, NotPublished, ShoalError
from engine.export_root import ExportRoot
from loaders.apply import follow_again, roll_back
from loaders.definition import follow_drops
from loaders.load import Applied, Observer, catch_up
from loaders.store_writer import StoreWriter


class ReloadRequest(pydantic.BaseModel):
    """What to reload: all views, or one; and for one, the kept generation to go back to."""

    model_config = pydantic.ConfigDict(extra="forbid")
    view: str | None = None
    snapshot: str | None = None
    accept_schema_change: bool = False


def views_to_reload(writer: StoreWriter, root: ExportRoot | None, request: ReloadRequest) -> list[str]:
    """Return the views that a request is about; those that the root dropped are removed first.

    Raises:
        LookupInvalid: it names a snapshot without a view.
        NotPublished: the root is gone.
    """
    if request.snapshot is not None:
        if request.view is None:
            raise LookupInvalid("a snapshot belongs to a view; name the view too")
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
    writer: StoreWriter, root: ExportRoot | None, view: str, request: ReloadRequest, observer: Observer
) -> dict[str, Any]:
    """Reload one view as `reload_view` does. As one of all views that cannot be, it is answered with its error, for the
    others to have their turn."""
    try:
        return reload_view(writer, root, view, request, observer)
    except ShoalError as error:
        if request.view is not None:
            raise
        return {"view": view} | error_document(error)


def reload_view(
    writer: StoreWriter, root: ExportRoot | None, view: str, request: ReloadRequest, observer: Observer
) -> dict[str, Any]:
    """Reload one view, and say where it stands then.

    With a snapshot named it goes back to that generation and stays. Named itself, it goes on along the log. As one of
    all views it catches up, unless it was told to stay.

    Raises:
        NotPublished: neither the root nor the store has the view, or there is no root to load from.
        GenerationNotKept: this node has no such generation.
        ShoalError: what is published cannot be applied; the last version stands.
    """
    applied: list[Applied] = []
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
