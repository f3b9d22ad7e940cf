"""Load a view again whose data in the store is damaged, losing as little as can be: no hand is needed for it.

What is damaged is removed and never written to: readers that opened it before may still have it mapped.
"""

import logging
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime

from engine.catalog import ViewRecord
from engine.directory_storage import sync_directory
from engine.environment import DATA, generation_path, make_file, store_full_named
from engine.errors import DeltaGap, FileDamaged, ManifestInvalid, NotPublished, ShoalError, StoreDamaged
from engine.export_root import ExportRoot
from engine.failpoints import reached
from engine.manifest import Manifest
from loaders.apply import build_base, forget_overlays, load_snapshot
from loaders.follow import LoadSnapshot, newest_snapshot, next_step
from loaders.generation import Progress, clear_unfinished
from loaders.remote_views import register
from loaders.rereading import ChunkGone, Rereader
from loaders.store_writer import StoreWriter

log = logging.getLogger("shoal.writer")

Started = Callable[[LoadSnapshot], Progress]
"""Told that a snapshot is about to be loaded, and why."""


def repair(writer: StoreWriter, root: ExportRoot, view: str, damage: StoreDamaged, started: Started) -> Manifest | None:
    """Make a view whose data is damaged whole again.

    If the base is damaged, it is built again from its snapshot, and its overlays stay. But if it holds pushed rows and
    is whole on the disk, its file is copied. If overlays are damaged, the view goes back to its base. If that is
    impossible, it starts over from the newest snapshot. Later entries of the log are then applied as usual.

    Returns:
        The snapshot that was loaded, if one was.

    Raises:
        StoreDamaged: the view stays damaged; the message says why.
    """
    reason = f"its data in the store is damaged: {damage}"
    try:
        root.check_exists()
        record = writer.record(view)
        if record is None:
            return _start_over(writer, root, view, None, started, reason)
        if record.view_schema.is_remote:
            register(writer, root.entry(view, record.applied_seq))
            return None
        if record.base.pushed and not writer.is_whole(record.base) and _taken_from_disk(writer, view, record):
            record = writer.record(view)
            assert record is not None
        _tell_what_is_lost(writer, view, record)
        if not writer.is_whole(record.base):
            return _replace_base(writer, root, view, record, started, reason)
        if view in writer.version().damaged:
            _check_lineage(root, view, record)
            forget_overlays(writer, view)
        return None
    except ShoalError as error:
        raise StoreDamaged(f"{damage}; that does not succeed: {error}") from error


def _taken_from_disk(writer: StoreWriter, view: str, record: ViewRecord) -> bool:
    """Copy a base's file from the disk, if it is damaged only in memory, to keep its pushed rows; return whether that
    worked."""
    base = record.base
    directory = generation_path(writer.store, view, base.id)
    copy = directory / f"{DATA}.copy"
    try:
        with store_full_named(directory):
            make_file(copy)
            Rereader().copy_from_disk(directory / DATA, copy, base)
            # Readers that map the old file keep it until they see the new record.
            os.replace(copy, directory / DATA)
            sync_directory(directory)
    except (ChunkGone, FileNotFoundError, StoreDamaged) as error:
        log.warning("%s: the base cannot be copied from the disk: %s", view, error)
        return False
    finally:
        copy.unlink(missing_ok=True)

    def swap(current: ViewRecord | None) -> ViewRecord | None:
        if current is None or current.base != base:
            return None
        return current.model_copy(update={"base": base.model_copy(update={"created_at": datetime.now(UTC)})})

    writer.commit_view(view, swap)
    log.warning("%s: its base was damaged only in memory, and was copied from the disk; no row is lost", view)
    return True


def _tell_what_is_lost(writer: StoreWriter, view: str, record: ViewRecord) -> None:
    """Pushed rows are nowhere but in the store: those in what is damaged cannot be had again."""
    readable = writer.readable(view)
    whole = {segment.record.id for segment in readable.segments} if readable else set()
    lost = sum(segment.pushed for segment in (record.base, *record.overlays) if segment.id not in whole)
    if lost:
        log.error("%s: %d rows that were pushed are in what is damaged, and are lost", view, lost)


def _replace_base(
    writer: StoreWriter, root: ExportRoot, view: str, record: ViewRecord, started: Started, reason: str
) -> Manifest:
    generation_id = record.base.id
    try:
        manifest = root.snapshot(view, generation_id)
        clear_unfinished(writer.store, view, but=generation_id)
        _remove(writer, view, generation_id)
        builder, base = build_base(writer, root, manifest, started(LoadSnapshot(manifest, reason)))
    except (FileDamaged, ManifestInvalid, NotPublished):
        # A base that was folded on this node was never published.
        if record.pinned:
            raise
        _check_lineage(root, view, record)
        return _start_over(writer, root, view, record, started, reason)

    def swap(current: ViewRecord | None) -> ViewRecord | None:
        if current is None or current.base != record.base:
            return None
        builder.complete()
        return current.model_copy(update={"base": base})

    writer.commit_view(view, swap)
    return manifest


def _start_over(
    writer: StoreWriter, root: ExportRoot, view: str, record: ViewRecord | None, started: Started, reason: str
) -> Manifest:
    manifest = newest_snapshot(root, view)
    kept = [base for base in record.kept if base.id == manifest.snapshot_id] if record else []
    if not any(writer.is_whole(base) for base in kept):
        _remove(writer, view, manifest.snapshot_id)
    # The view had the schema of an earlier entry, which need not succeed that of a later one.
    is_earlier = record is not None and manifest.seq <= record.applied_seq
    load_snapshot(writer, root, manifest, started(LoadSnapshot(manifest, reason)), accept_schema_change=is_earlier)
    return manifest


def _check_lineage(root: ExportRoot, view: str, record: ViewRecord) -> None:
    """Raises ForeignDelta if the root is another than the view came from: then what it has is no replacement."""
    with suppress(DeltaGap, ManifestInvalid):
        next_step(root, view, record)


def _remove(writer: StoreWriter, view: str, generation_id: str) -> None:
    shutil.rmtree(generation_path(writer.store, view, generation_id), ignore_errors=True)
    reached("repair.base-removed")
