"""Define views for pushed rows only, which no export root publishes. Drop views of any kind."""

from datetime import UTC, datetime

from shoal.engine.base.errors import UnknownFeature
from shoal.engine.format.catalog import ViewRecord
from shoal.engine.format.schema import ViewSchema
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.root.manifest import DroppedView
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.segments.generation import GenerationBuilder, fold_id

BEFORE_THE_LOG = 0
"""The seq of a view without any applied entry. If a root publishes the view later, its first snapshot is next."""


def define_view(writer: StoreWriter, schema: ViewSchema) -> None:
    """Create a view of this schema without rows, or change the existing view to this schema.

    Raises:
        SchemaChangeRefused: rows of the existing view cannot be read under this schema.
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
        StoreFull: there is no room to record the removal; the view stays.
    """
    with writer.changing(name):
        if name not in writer.version().names:
            known = ", ".join(writer.version().names) or "none"
            raise UnknownFeature(f"the store has no view {name!r}; it has {known}", "view", name)
        writer.remove_view(name)


def follow_drops(writer: StoreWriter, root: ExportRoot, only: str | None = None) -> dict[str, int]:
    """Remove the views that a root dropped, including the rows that were pushed to them.

    Args:
        only: the name of the only view to remove; None to remove all dropped views.

    Returns:
        The removed views, each with its last seq in the root.

    Raises:
        ManifestInvalid: the root's list of dropped views is damaged.
        StoreFull: there is no room to record a removal.
    """
    removed = {}
    for drop in root.dropped_views():
        if only not in (None, drop.name):
            continue
        version = writer.version()
        record = version.record(drop.name)
        # A concurrent search for the view in the root may have noted a trouble, because the view is gone.
        is_noted = record is None and drop.name in version.troubles and drop.name not in root.views()
        if is_noted or (record is not None and _is_dropped(record, drop, is_followed=version.store.root == str(root))):
            drop_view(writer, drop.name)
            removed[drop.name] = drop.seq
    return removed


def _is_dropped(record: ViewRecord, drop: DroppedView, *, is_followed: bool) -> bool:
    """Return whether a drop concerns the view in the store, and not a view of the same name in another root."""
    if not 0 < record.applied_seq <= drop.seq:
        return False
    if record.applied_seq < drop.oldest_seq:
        return is_followed
    return record.applied_entry in drop.entries
