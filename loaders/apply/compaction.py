"""Keep overlays few and small: merge them in tiers, and fold them with their base into a new base.

Tiers: the newest overlay is merged with its older neighbours, until the next neighbour is more than `TIER_GROWTH`
times the merged size. So the sizes grow geometrically with age, and a row is rewritten once per tier, not once per
delta. This is the logarithmic method of Bentley and Saxe, as used by log-structured merge trees.
"""

from collections.abc import Callable, Sequence

from shoal.engine.format.catalog import SegmentRecord, ViewRecord
from shoal.engine.format.schema import ViewSchema
from shoal.engine.store.segment import Segment
from shoal.loaders.apply.retention import fates_in_fold
from shoal.loaders.commit.store_writer import NewOverlay, StoreWriter, seal_overlay
from shoal.loaders.segments.generation import CHUNK_BYTES, GenerationBuilder, fold_id, is_fold
from shoal.loaders.segments.merge import Merge

TIER_GROWTH = 4
MAX_OVERLAYS = 6
FOLD_SHARE = 0.25
FOLD_LEAST_ROWS = 10_000
"""Overlays are folded once they have more than FOLD_SHARE times the rows of the base, and more than FOLD_LEAST_ROWS
rows. Without the second condition, the overlays of a tiny view would be folded at every delta, although they cost
nothing."""


def overlays_to_merge(overlays: Sequence[SegmentRecord]) -> int:
    """Return how many of a view's newest overlays to merge into one; 0 if no merge is necessary."""
    sizes = [overlay.rows + overlay.tombstones for overlay in overlays]
    count = 1
    merged = sizes[0] if sizes else 0
    while count < len(sizes) and sizes[count] <= TIER_GROWTH * merged:
        merged += sizes[count]
        count += 1
    if len(sizes) - count + 1 > MAX_OVERLAYS:
        count = len(sizes) - MAX_OVERLAYS + 1
    return count if count > 1 else 0


def should_fold(record: ViewRecord) -> bool:
    """Return whether a view's overlays have outgrown their share of its base."""
    changed = sum(overlay.rows + overlay.tombstones for overlay in record.overlays)
    return changed > max(FOLD_LEAST_ROWS, FOLD_SHARE * (record.base.rows + record.base.tombstones))


def merge_overlays(writer: StoreWriter, view: str) -> bool:
    """Merge the newest overlays as the tiers require, except overlays in a running fold. Return whether any were
    merged."""
    with writer.changing(view):
        version = writer.version().view(view)
        count = overlays_to_merge(unfolded(version.record.overlays, writer.folding.get(view)))
        if not count:
            return False
        writer.check_sources(view, version.segments[:count])
        overlay = merged(version.record.view_schema, version.segments[:count])

        def replace(record: ViewRecord | None) -> ViewRecord | None:
            if record is None or view in writer.version().damaged:
                return None
            return record.model_copy(update={"overlays": (overlay.record, *record.overlays[count:])})

        return writer.commit_view(view, replace, overlay) is not None


def unfolded(overlays: Sequence[SegmentRecord], newest_folded: str | None) -> Sequence[SegmentRecord]:
    """Return the overlays of a view, newest first, that are not part of a running fold."""
    ids = [overlay.id for overlay in overlays]
    return overlays[: ids.index(newest_folded)] if newest_folded in ids else overlays


def merged(schema: ViewSchema, segments: Sequence[Segment]) -> NewOverlay:
    """Merge several segments of a view, given newest first, into one overlay, and return it."""
    merge = Merge(segments, schema)
    newest = segments[0].record
    oldest = segments[-1].record
    return seal_overlay(
        schema,
        list(merge.chunks(CHUNK_BYTES)),
        merge.origins,
        first_seq=oldest.first_seq,
        last_seq=newest.last_seq,
        last_entry=newest.last_entry,
        watermark=newest.watermark,
    )


def fold(writer: StoreWriter, view: str, progress: Callable[[int], None] = lambda rows: None) -> bool:
    """Write a new base from the current base and overlays; overlays that arrive meanwhile stay above the new base.

    Return whether the new base is in use. It is not used if the old base or the folded overlays were replaced
    meanwhile, or if the view turned out to be damaged.
    """
    writer.check_in_place()
    with writer.changing(view):
        version = writer.version().view(view)
        record = version.record
        if record.overlays:
            writer.folding[view] = record.overlays[0].id
    builder = GenerationBuilder(writer.store, view, fold_id(record.applied_seq))
    try:
        writer.check_sources(view, version.segments)
        merge = Merge(version.segments, record.view_schema, fates=fates_in_fold(writer, version))
        for chunk in merge.chunks(CHUNK_BYTES):
            builder.add(chunk)
            progress(chunk.rows)
        base = builder.record(
            record.view_schema,
            merge.origins,
            first_seq=record.base.first_seq,
            last_seq=record.applied_seq,
            last_entry=record.applied_entry,
            watermark=record.watermark,
            low_watermark=record.low_watermark,
        )

        def swap(current: ViewRecord | None) -> ViewRecord | None:
            if current is None or current.base != record.base or view in writer.version().damaged:
                return None
            folded = len(record.overlays)
            if current.overlays[len(current.overlays) - folded :] != record.overlays:
                return None
            builder.complete()
            # Keep only snapshots for rollback: a folded base is not a published state.
            kept = current.kept if is_fold(record.base.id) else (record.base, *current.kept)
            newer = current.overlays[: len(current.overlays) - folded]
            update = {"base": base, "overlays": newer, "kept": kept[: writer.kept_generations]}
            return current.model_copy(update=update)

        return writer.commit_view(view, swap) is not None
    finally:
        writer.folding.pop(view, None)
        builder.discard()
