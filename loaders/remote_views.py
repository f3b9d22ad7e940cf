"""Views that are kept in tables, in the catalog of a node: what they look like and how far the log is, but no rows."""

from datetime import UTC, datetime

from engine.catalog import ViewRecord
from engine.errors import SchemaChangeRefused
from engine.manifest import Manifest
from loaders.generation import GenerationBuilder, fold_id
from loaders.low_watermark import low_watermark_at
from loaders.store_writer import StoreWriter


def register(writer: StoreWriter, manifest: Manifest) -> None:
    """Have a view stand at an entry of its log without any rows; what the node has of it goes.

    Raises:
        SchemaChangeRefused: the join keys are others than before.
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
    """Raises SchemaChangeRefused if a delta is to be laid over a view of which this node has no rows."""
    if record is not None and record.view_schema.is_remote and manifest.kind == "delta":
        raise SchemaChangeRefused(
            f"view {manifest.view.name!r}: delta {manifest.seq} is of a view that is kept on each node, and this one "
            f"has none of its rows, as it was kept in table {record.view_schema.table_name!r}; publish a snapshot "
            f"with `shoal export --full`"
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
