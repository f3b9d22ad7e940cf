"""Views that no export root publishes: they are defined here, and rows are pushed to them."""

from datetime import UTC, datetime

from engine.catalog import ViewRecord
from engine.errors import UnknownFeature
from engine.export_root import ExportRoot
from engine.manifest import DroppedView
from engine.schema import ViewSchema
from loaders.generation import GenerationBuilder, fold_id
from loaders.store_writer import StoreWriter

BEFORE_THE_LOG = 0
"""The seq of a view of which no entry was applied: should a root come to publish it, its first snapshot is next."""


def define_view(writer: StoreWriter, schema: ViewSchema) -> None:
    """Have a view of this schema in the store: a new one without rows, or the one there is, changed to it.

    Raises:
        SchemaChangeRefused: rows of the view that there is cannot be read under this schema.
        StoreFull: there is no room.
    """
    writer.check_in_place()
    with writer.changing(schema.name):
        old = writer.record(schema.name)
        if old is None:
            _create(writer, schema)
            return
        schema.check_succeeds(old.view_schema)
        if schema != old.view_schema:
            changed = old.model_copy(update={"view_schema": schema})
            writer.commit_view(schema.name, lambda record: changed)


def _create(writer: StoreWriter, schema: ViewSchema) -> None:
    builder = GenerationBuilder(writer.store, schema.name, fold_id(BEFORE_THE_LOG))
    base = builder.record(schema, (), first_seq=BEFORE_THE_LOG, last_seq=BEFORE_THE_LOG, last_entry="", watermark=None)
    now = datetime.now(UTC)

    def create(record: ViewRecord | None) -> ViewRecord:
        builder.complete()
        return ViewRecord(
            view_schema=schema,
            base=base,
            applied_seq=BEFORE_THE_LOG,
            applied_entry="",
            published_at=now,
            applied_at=now,
            watermark=None,
        )

    writer.commit_view(schema.name, create)


def drop_view(writer: StoreWriter, name: str) -> None:
    """Remove a view and all its rows from the store. If a root publishes the view, the store loads it again.

    Raises:
        UnknownFeature: the store has no such view.
        StoreFull: there is no room to record it; the view stays.
    """
    with writer.changing(name):
        if name not in writer.version().names:
            known = ", ".join(writer.version().names) or "none"
            raise UnknownFeature(f"the store has no view {name!r}; it has {known}", "view", name)
        writer.remove_view(name)


def follow_drops(writer: StoreWriter, root: ExportRoot, only: str | None = None) -> dict[str, int]:
    """Remove the views that a root dropped, or one of them, with rows that were pushed to them.

    Returns:
        The views that were removed, and the last seq that each had in the root.

    Raises:
        ManifestInvalid: the root's list of them is damaged.
        StoreFull: there is no room to record it.
    """
    removed = {}
    for drop in root.dropped_views():
        if only not in (None, drop.name):
            continue
        version = writer.version()
        record = version.record(drop.name)
        # A concurrent look for the view may have recorded a trouble, because it is gone.
        is_noted = record is None and drop.name in version.troubles and drop.name not in root.views()
        if is_noted or (record is not None and _is_dropped(record, drop, is_followed=version.store.root == str(root))):
            drop_view(writer, drop.name)
            removed[drop.name] = drop.seq
    return removed


def _is_dropped(record: ViewRecord, drop: DroppedView, *, is_followed: bool) -> bool:
    """Whether a drop is of the view that the store holds, and not of one that has its name in another root."""
    if not 0 < record.applied_seq <= drop.seq:
        return False
    if record.applied_seq < drop.oldest_seq:
        return is_followed
    return record.applied_entry in drop.entries
