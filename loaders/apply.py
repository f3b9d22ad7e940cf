"""Apply published entries: a snapshot becomes a base generation, a delta an overlay; or go back to an earlier base."""

import shutil
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from engine.catalog import LowWatermark, Origin, SegmentRecord, ViewRecord
from engine.environment import generation_path
from engine.errors import ForeignDelta, GenerationNotKept
from engine.export_root import ExportRoot
from engine.kernels import finding
from engine.kernels.compiling import kernel
from engine.kernels.gathering import NO_EVENT_TIME, event_time_of
from engine.kernels.memory import load_u8
from engine.key_columns import Hashes
from engine.keys import KEY_HASH, KEY_HASH_2
from engine.layout import ROW_PRESENCE, ROW_STATE, TOMBSTONE, RowLayout
from engine.lookup import find_rows
from engine.manifest import EVENT_TIMESTAMP, Manifest
from engine.manifest import TOMBSTONE as TOMBSTONE_COLUMN
from engine.reading import read_generation
from engine.segment import Segment
from engine.version import ViewVersion
from loaders.generation import (
    GenerationBuilder,
    Progress,
    build_from_entry,
    clear_unfinished,
    encode_published,
)
from loaders.low_watermark import low_watermark_at
from loaders.published_rows import EntryReader, RowGroup
from loaders.retention import Ahead, decided_ahead, retained
from loaders.segment_writer import ChunkBuilder
from loaders.store_writer import NewOverlay, StoreWriter, seal_overlay

_ANY_TIME = int(NO_EVENT_TIME)


def load_snapshot(
    writer: StoreWriter, root: ExportRoot, manifest: Manifest, progress: Progress, *, accept_schema_change: bool = False
) -> int:
    """Build a snapshot's base generation, going on with an unfinished build of it, and make it the view's base; returns
    its rows.

    One that is kept from before is taken as it is.

    Raises:
        SchemaChangeRefused: the schema does not succeed the store's, and the change was not accepted.
        FileDamaged: a file is not what its manifest says; the last version stands.
        StoreFull: there is no room; loading again goes on where it stopped.
    """
    view, generation_id = manifest.view.name, manifest.snapshot_id
    old = writer.record(view)
    if old is not None and not accept_schema_change:
        manifest.view.check_succeeds(old.view_schema)
    clear_unfinished(writer.store, view, but=generation_id)

    kept = next((kept for kept in old.kept if kept.id == generation_id), None) if old is not None else None
    if kept is not None and writer.is_whole(kept):
        _take_kept(writer, manifest, kept)
        return kept.rows
    if kept is not None:
        # Its chunks are not to be taken for those of an unfinished build.
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
    """Go to the base that a snapshot became before, and that was kept."""
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
    """The pushed rows of a view that stay over a base that it goes back to."""
    return retained(_readable(writer, view, slice(None)), base, base.record.view_schema)


def _readable(writer: StoreWriter, view: str, checked: slice) -> ViewVersion | None:
    """What can be read of a view, whose pushed rows are about to be copied; raises StoreDamaged if they cannot be told
    from wrong ones in the segments that are to be checked."""
    version = writer.readable(view)
    if version is not None:
        writer.check_sources(view, (segment for segment in version.segments[checked] if segment.record.pushed))
    return version


def build_base(
    writer: StoreWriter, root: ExportRoot, manifest: Manifest, progress: Progress
) -> tuple[GenerationBuilder, SegmentRecord]:
    """A snapshot's base generation, built but not completed, and its record; raises as `load_snapshot`."""
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
    """Lay a delta over a view: its rows and tombstones become the newest overlay; returns how many of each it has that
    the store holds.

    A row with an older event time than the one in the store stays out: the newest event time wins, then the newest seq.
    A key that the log removed may come back with any event time: a tombstone of the log is forgotten when the next
    snapshot or fold comes, or remembered against pushed rows only (`loaders.retention`). What is published must be
    served the same by all replicas.

    Raises:
        SchemaChangeRefused: the schema does not succeed the store's.
        FileDamaged: a file is not what its manifest says; the last version stands.
        StoreFull: there is no room; the last version stands.
    """
    if not manifest.files and _apply_heartbeat(writer, manifest):
        return 0, 0
    reader = EntryReader(root, manifest, writer.shard)
    # First, as pushes to the view wait from then on, and a root may take its time.
    published = list(reader.batches())
    with writer.changing(manifest.view.name):
        _lay_over(writer, reader, published, manifest)
    tombstones = sum(batch.column(TOMBSTONE_COLUMN).true_count for _, batch in published)
    return sum(batch.num_rows for _, batch in published) - tombstones, tombstones


def _apply_heartbeat(writer: StoreWriter, manifest: Manifest) -> bool:
    """Have a view stand at an entry without rows; whether it was one that changes nothing about the view's rows."""
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
    """Serve a kept base as it was loaded, under what was pushed since, and stay there until `follow_again`.

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
    """Have a view stand where its base does, as if no delta behind it had been applied yet; what was pushed, and can be
    read, stays."""
    with writer.changing(view):
        record = writer.record(view)
        if record is not None:
            base = read_generation(writer.store, record.base)
            pushed = _pushed_over(writer, view, base)
            at_base = _at_base(record, record.base, pushed)
            writer.commit_view(view, lambda record: at_base, pushed)


def follow_again(writer: StoreWriter, view: str) -> None:
    """Let a view that was rolled back go on along the log."""
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
    """A view that stands at a snapshot, with what was pushed over it; bases before it stay for going back, unless they
    are damaged."""
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
    on_time = event_times(batch) >= stored_event_times(version, key_hashes(batch), of_pushes=False)
    return batch if on_time.all() else batch.filter(pa.array(on_time))


def key_hashes(rows: pa.RecordBatch) -> Hashes:
    """Both hashes of the key of each row, published or pushed."""
    return np.stack([rows.column(name).to_numpy() for name in (KEY_HASH, KEY_HASH_2)])


def event_times(rows: pa.RecordBatch) -> npt.NDArray[np.int64]:
    """int64[rows], the event time of each row, published or pushed, in microseconds since 1970."""
    times: npt.NDArray[np.int64] = rows.column(EVENT_TIMESTAMP).cast(pa.int64()).to_numpy()
    return times


def stored_event_times(version: ViewVersion, keys: Hashes, *, of_pushes: bool) -> npt.NDArray[np.int64]:
    """int64[keys], the event time that a row must have at least to take the place of what a view has of each key; of
    pushed rows, or of published ones, for which the tombstones of the log do not count."""
    stored = np.empty(keys.shape[1], np.int64)
    event_times_at(find_rows(version, keys).address, of_pushes, stored)
    return stored


@kernel
def event_times_at(address: Any, all_tombstones: bool, event_time: Any) -> None:
    """Write the event time that a later row must have at least to replace the row at an address: NO_EVENT_TIME if any
    will do, because there is no row, or a tombstone that was not pushed, unless all tombstones count."""
    for row in range(address.size):
        event_time[row] = _ANY_TIME
        if address[row] == finding.NOT_FOUND:
            continue
        if all_tombstones or load_u8(address[row] + ROW_PRESENCE) & ROW_STATE != TOMBSTONE:
            event_time[row] = event_time_of(address[row])
