"""Register on a node the views that are kept in tables: record their schema and their position in the log, but no
rows."""

from datetime import UTC, datetime

from shoal.engine.base.errors import SchemaChangeRefused
from shoal.engine.format.catalog import ViewRecord
from shoal.engine.root.manifest import Manifest
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.segments.generation import GenerationBuilder, fold_id
from shoal.loaders.segments.low_watermark import low_watermark_at


def register(writer: StoreWriter, manifest: Manifest) -> None:
    """Move a view to an entry of its log without loading rows. Remove the rows of the view that this node has.

    Raises:
        SchemaChangeRefused: the view's schema on this node cannot be changed to the entry's schema.
        StoreFull: there is no room.
    """
    view = manifest.view
    with writer.changing(view.name):
        old = writer.record(view.name)
        if old is not None:
            view.check_succeeds(old.view_schema)
        if old is not None and old.view_schema.is_remote and writer.damage(view.name) is None:
            at_entry = _at_entry(old, manifest)
            writer.commit_view(view.name, lambda record: at_entry)
            return
        builder = GenerationBuilder(writer.store, view.name, fold_id(manifest.seq))
        base = builder.record(
            view, (), first_seq=manifest.seq, last_seq=manifest.seq, last_entry=manifest.id, watermark=None
        )
        now = datetime.now(UTC)

        def create(record: ViewRecord | None) -> ViewRecord:
            builder.complete()
            return ViewRecord(
                view_schema=view,
                base=base,
                applied_seq=manifest.seq,
                applied_entry=manifest.id,
                published_at=manifest.published_at,
                applied_at=now,
                watermark=manifest.watermark,
                low_watermark=low_watermark_at(manifest, None),
            )

        writer.commit_view(view.name, create)


def check_can_be_loaded(manifest: Manifest, record: ViewRecord | None) -> None:
    """Raise SchemaChangeRefused if the manifest is a delta, but this node has no rows to apply the delta to."""
    if record is not None and record.view_schema.is_remote and manifest.kind == "delta":
        raise SchemaChangeRefused(
            f"view {manifest.view.name!r}: delta {manifest.seq} needs the view's earlier rows on this node, but this "
            f"node has no rows, because the view was kept in table {record.view_schema.table_name!r}; publish a "
            f"snapshot with `shoal export --full`"
        )


def _at_entry(record: ViewRecord, manifest: Manifest) -> ViewRecord:
    return record.model_copy(
        update={
            "view_schema": manifest.view,
            "applied_seq": manifest.seq,
            "applied_entry": manifest.id,
            "published_at": manifest.published_at,
            "applied_at": datetime.now(UTC),
            "watermark": manifest.watermark,
            "low_watermark": low_watermark_at(manifest, record.low_watermark),
        }
    )
