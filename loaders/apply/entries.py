"""Apply published entries: a snapshot becomes a base generation, a delta becomes an overlay. Also roll views back."""

import shutil
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shoal.engine.base.errors import ForeignDelta, GenerationNotKept
from shoal.engine.format.catalog import LowWatermark, Origin, SegmentRecord, ViewRecord
from shoal.engine.format.keys import KEY_HASH, KEY_HASH_2
from shoal.engine.format.layout import ROW_PRESENCE, ROW_STATE, TOMBSTONE, RowLayout
from shoal.engine.format.paths import generation_path
from shoal.engine.kernels import finding
from shoal.engine.kernels.compiling import kernel
from shoal.engine.kernels.gathering import NO_EVENT_TIME, event_time_of
from shoal.engine.kernels.memory import load_u8
from shoal.engine.lookup.columns import find_rows
from shoal.engine.lookup.key_columns import Hashes
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.root.manifest import EVENT_TIMESTAMP, Manifest
from shoal.engine.root.manifest import TOMBSTONE as TOMBSTONE_COLUMN
from shoal.engine.store.open_version import read_generation
from shoal.engine.store.segment import Segment
from shoal.engine.store.version import ViewVersion
from shoal.loaders.apply.retention import Ahead, decided_ahead, retained
from shoal.loaders.commit.store_writer import NewOverlay, StoreWriter, seal_overlay
from shoal.loaders.segments.generation import (
    GenerationBuilder,
    Progress,
    build_from_entry,
    clear_unfinished,
    encode_published,
)
from shoal.loaders.segments.low_watermark import low_watermark_at
from shoal.loaders.segments.published_rows import EntryReader, RowGroup
from shoal.loaders.segments.segment_writer import ChunkBuilder

_ANY_TIME = int(NO_EVENT_TIME)


def load_snapshot(
    writer: StoreWriter, root: ExportRoot, manifest: Manifest, progress: Progress, *, accept_schema_change: bool = False
) -> int:
    """Build a snapshot's base generation, make it the view's base, and return its number of rows.

    An unfinished build of the same snapshot is resumed. A kept generation of the same snapshot is used without a build.

    Raises:
        SchemaChangeRefused: the store's schema cannot be changed to the snapshot's schema, and the change was not
            accepted.
        FileDamaged: a file does not match its manifest; the last version stays in use.
        StoreFull: there is no room; loading again resumes the build.
    """
    view = manifest.view.name
    generation_id = manifest.snapshot_id
    old = writer.record(view)
    if old is not None and not accept_schema_change:
        manifest.view.check_succeeds(old.view_schema)
    clear_unfinished(writer.store, view, but=generation_id)

    kept = next((kept for kept in old.kept if kept.id == generation_id), None) if old is not None else None
    if kept is not None and writer.is_whole(kept):
        _take_kept(writer, manifest, kept)
        return kept.rows
    if kept is not None:
        # Remove the damaged generation: otherwise its chunks would be taken for an unfinished build.
        shutil.rmtree(generation_path(writer.store, view, generation_id), ignore_errors=True)
    builder, base = build_base(writer, root, manifest, progress)
    segment = builder.segment(base)
    ahead = _decided_ahead(writer, manifest, segment)
    with writer.changing(view):
        pushed = _retained(writer, manifest, segment, ahead)

        def swap(record: ViewRecord | None) -> ViewRecord:
            builder.complete()
            return _on_base(writer, manifest, base, record, pushed)

        writer.commit_view(view, swap, pushed)
    return base.rows


def _take_kept(writer: StoreWriter, manifest: Manifest, base: SegmentRecord) -> None:
    """Make a kept base the view's base again; it was built from the same snapshot before."""
    view = manifest.view.name
    segment = read_generation(writer.store, base)
    ahead = _decided_ahead(writer, manifest, segment)
    with writer.changing(view):
        pushed = _retained(writer, manifest, segment, ahead)
        writer.commit_view(view, lambda record: _on_base(writer, manifest, base, record, pushed), pushed)


def _decided_ahead(writer: StoreWriter, manifest: Manifest, base: Segment) -> Ahead | None:
    view = manifest.view.name
    version = _readable(writer, view, slice(-1, None))
    return decided_ahead(version, base, manifest.view, removals=writer.is_pushed_to(view))


def _retained(writer: StoreWriter, manifest: Manifest, base: Segment, ahead: Ahead | None) -> NewOverlay | None:
    view = manifest.view.name
    version = _readable(writer, view, slice(-1) if ahead else slice(None))
    return retained(version, base, manifest.view, removals=writer.is_pushed_to(view), ahead=ahead)


def _pushed_over(writer: StoreWriter, view: str, base: Segment) -> NewOverlay | None:
    """Return the pushed rows of a view that stay above a base when the view is rolled back to this base."""
    return retained(_readable(writer, view, slice(None)), base, base.record.view_schema)


def _readable(writer: StoreWriter, view: str, checked: slice) -> ViewVersion | None:
    """Return the readable segments of a view, so that its pushed rows can be copied. Return None if nothing can be
    read.

    Verify the segments in `checked` that contain pushed rows, and raise StoreDamaged if one of them is damaged.
    """
    version = writer.readable(view)
    if version is not None:
        writer.check_sources(view, (segment for segment in version.segments[checked] if segment.record.pushed))
    return version


def build_base(
    writer: StoreWriter, root: ExportRoot, manifest: Manifest, progress: Progress
) -> tuple[GenerationBuilder, SegmentRecord]:
    """Build a snapshot's base generation, but do not complete it. Return its builder and its record.

    Raise the same errors as `load_snapshot`.
    """
    builder = GenerationBuilder(writer.store, manifest.view.name, manifest.snapshot_id)
    build_from_entry(builder, EntryReader(root, manifest, writer.shard), progress)
    return builder, builder.record(
        manifest.view,
        (_origin(manifest),),
        first_seq=manifest.seq,
        last_seq=manifest.seq,
        last_entry=manifest.id,
        watermark=manifest.watermark,
        low_watermark=low_watermark_at(manifest, None),
    )


def apply_delta(writer: StoreWriter, root: ExportRoot, manifest: Manifest) -> tuple[int, int]:
    """Apply a delta to a view: its rows and tombstones become the newest overlay. Return how many rows and tombstones
    of the delta belong to this store.

    A row with an older event time than the stored row is left out: the newest event time wins, then the newest seq. A
    key that the log removed may come back with any event time. Otherwise replicas could serve different published rows,
    because a tombstone of the log is forgotten at the next snapshot or fold. If such a tombstone is remembered, it
    affects only pushed rows (`shoal.loaders.apply.retention`).

    Raises:
        SchemaChangeRefused: the store's schema cannot be changed to the delta's schema.
        FileDamaged: a file does not match its manifest; the last version stays in use.
        StoreFull: there is no room; the last version stays in use.
    """
    if not manifest.files and _apply_heartbeat(writer, manifest):
        return 0, 0
    reader = EntryReader(root, manifest, writer.shard)
    # Read before taking the lock: pushes to the view wait for the lock, and a root may be slow.
    published = list(reader.batches())
    with writer.changing(manifest.view.name):
        _lay_over(writer, reader, published, manifest)
    tombstones = sum(batch.column(TOMBSTONE_COLUMN).true_count for _, batch in published)
    return sum(batch.num_rows for _, batch in published) - tombstones, tombstones


def _apply_heartbeat(writer: StoreWriter, manifest: Manifest) -> bool:
    """Move a view to an entry without rows. Return False, and change nothing, if the entry needs to be applied in the
    usual way."""
    record = writer.record(manifest.view.name)
    if record is None or record.view_schema != manifest.view:
        return False

    def stand_at(record: ViewRecord) -> ViewRecord | None:
        if record.applied_entry != manifest.parent or record.view_schema != manifest.view:
            return None
        return _at_entry(manifest, record.base, record.overlays, record.kept, record.low_watermark)

    return writer.commit_heartbeat(manifest.view.name, stand_at) is not None


def _lay_over(
    writer: StoreWriter, reader: EntryReader, published: list[tuple[RowGroup, pa.RecordBatch]], manifest: Manifest
) -> None:
    view = manifest.view.name
    version = writer.version().view(view)
    manifest.view.check_succeeds(version.record.view_schema)
    chunks = _delta_chunks(reader, published, version)
    overlay = None
    if chunks:
        overlay = seal_overlay(
            manifest.view,
            chunks,
            (_origin(manifest),),
            first_seq=manifest.seq,
            last_seq=manifest.seq,
            last_entry=manifest.id,
            watermark=manifest.watermark,
        )

    def lay_over(record: ViewRecord | None) -> ViewRecord:
        if record is None or record.applied_entry != manifest.parent:
            raise ForeignDelta(f"view {view!r} moved on while delta {manifest.seq} was being read; it is applied again")
        overlays = (overlay.record, *record.overlays) if overlay else record.overlays
        return _at_entry(manifest, record.base, overlays, record.kept, record.low_watermark)

    writer.commit_view(view, lay_over, overlay)


def roll_back(writer: StoreWriter, view: str, generation_id: str) -> None:
    """Serve a kept base as it was loaded, until `follow_again` is called. The rows that were pushed since then stay
    above it.

    Raises:
        GenerationNotKept: this node has no such generation of the view, or it is damaged.
    """
    with writer.changing(view):
        record = writer.record(view)
        known = (record.base, *record.kept) if record else ()
        base = next((base for base in known if base.id == generation_id), None)
        if base is None or record is None:
            ids = ", ".join(base.id for base in known) or "none"
            raise GenerationNotKept(f"view {view!r} has no generation {generation_id!r} on this node; it has {ids}")
        if not writer.is_whole(base):
            raise GenerationNotKept(f"view {view!r}: generation {generation_id!r} is damaged; go back to another")
        pushed = _pushed_over(writer, view, read_generation(writer.store, base))
        kept = tuple(other for other in known if other.id != generation_id)
        went_back = _at_base(record, base, pushed).model_copy(update={"kept": kept, "pinned": True})
        writer.commit_view(view, lambda record: went_back, pushed)


def forget_overlays(writer: StoreWriter, view: str) -> None:
    """Move a view back to its base, as if no delta after the base had been applied. Readable pushed rows stay."""
    with writer.changing(view):
        record = writer.record(view)
        if record is not None:
            base = read_generation(writer.store, record.base)
            pushed = _pushed_over(writer, view, base)
            at_base = _at_base(record, record.base, pushed)
            writer.commit_view(view, lambda record: at_base, pushed)


def follow_again(writer: StoreWriter, view: str) -> None:
    """Let a rolled-back view follow the log again."""
    writer.commit_view(
        view, lambda record: record.model_copy(update={"pinned": False}) if record and record.pinned else None
    )


def _at_base(record: ViewRecord, base: SegmentRecord, pushed: NewOverlay | None) -> ViewRecord:
    return record.model_copy(
        update={
            "view_schema": base.view_schema,
            "base": base,
            "overlays": (pushed.record,) if pushed else (),
            "applied_seq": base.last_seq,
            "applied_entry": base.last_entry,
            "applied_at": datetime.now(UTC),
            "watermark": base.watermark,
            "low_watermark": base.low_watermark,
        }
    )


def _at_entry(
    manifest: Manifest,
    base: SegmentRecord,
    overlays: tuple[SegmentRecord, ...],
    kept: tuple[SegmentRecord, ...],
    low_watermark: LowWatermark | None,
) -> ViewRecord:
    return ViewRecord(
        view_schema=manifest.view,
        base=base,
        overlays=overlays,
        kept=kept,
        applied_seq=manifest.seq,
        applied_entry=manifest.id,
        published_at=manifest.published_at,
        applied_at=datetime.now(UTC),
        watermark=manifest.watermark,
        low_watermark=low_watermark_at(manifest, low_watermark),
    )


def _on_base(
    writer: StoreWriter,
    manifest: Manifest,
    base: SegmentRecord,
    record: ViewRecord | None,
    pushed: NewOverlay | None,
) -> ViewRecord:
    """Return the record of a view at a snapshot, with pushed rows above it. Earlier bases are kept for rollback, unless
    they are damaged."""
    earlier = (record.base, *record.kept) if record else ()
    kept = tuple(other for other in earlier if other.id != base.id and writer.is_whole(other))
    overlays = (pushed.record,) if pushed else ()
    low_watermark = record.low_watermark if record is not None else None
    return _at_entry(manifest, base, overlays, kept[: writer.kept_generations], low_watermark)


def _origin(manifest: Manifest) -> Origin:
    return Origin(kind=manifest.kind, seq=manifest.seq, id=manifest.id)


def _delta_chunks(
    reader: EntryReader, published: list[tuple[RowGroup, pa.RecordBatch]], version: ViewVersion
) -> list[ChunkBuilder]:
    layout = RowLayout(reader.manifest.view)
    chunks = []
    for group, rows in published:
        batch = _without_late_rows(rows, version)
        if batch.num_rows:
            chunk = ChunkBuilder(layout, batch.num_rows, with_origins=False)
            encode_published(chunk, 0, batch, reader, group)
            chunks.append(chunk)
    return chunks


def _without_late_rows(batch: pa.RecordBatch, version: ViewVersion) -> pa.RecordBatch:
    on_time = event_times(batch) >= stored_event_times(version, published_key_hashes(batch), of_pushes=False)
    return batch if on_time.all() else batch.filter(pa.array(on_time))


def published_key_hashes(rows: pa.RecordBatch) -> Hashes:
    """Return both hashes of the key of each row, published or pushed: int64[2, rows]."""
    return np.stack([rows.column(name).to_numpy() for name in (KEY_HASH, KEY_HASH_2)])


def event_times(rows: pa.RecordBatch) -> npt.NDArray[np.int64]:
    """Return the event time of each row, published or pushed: int64[rows], in microseconds since 1970."""
    times: npt.NDArray[np.int64] = rows.column(EVENT_TIMESTAMP).cast(pa.int64()).to_numpy()
    return times


def stored_event_times(version: ViewVersion, keys: Hashes, *, of_pushes: bool) -> npt.NDArray[np.int64]:
    """Return the minimum event time that a new row of each key needs to replace the stored row: int64[keys].

    Args:
        of_pushes: whether the new rows are pushed. For published rows, stored tombstones of the log do not count.
    """
    stored = np.empty(keys.shape[1], np.int64)
    event_times_at(find_rows(version, keys).address, of_pushes, stored)
    return stored


@kernel
def event_times_at(address: Any, all_tombstones: bool, event_time: Any) -> None:
    """Write the minimum event time that a later row needs to replace the row at each address.

    If there is no row, the minimum is NO_EVENT_TIME, so that any row can be written. The same applies to a tombstone
    that was not pushed, unless `all_tombstones` is true.
    """
    for row in range(address.size):
        event_time[row] = _ANY_TIME
        if address[row] == finding.NOT_FOUND:
            continue
        if all_tombstones or load_u8(address[row] + ROW_PRESENCE) & ROW_STATE != TOMBSTONE:
            event_time[row] = event_time_of(address[row])
