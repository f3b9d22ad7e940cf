"""Repair a view with damaged data in the store, automatically and with as little loss as possible.

Damaged files are removed and never written to: readers that opened them earlier may still have them mapped.
"""

import logging
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime

from shoal.engine.base.errors import (
    DeltaGap,
    FileDamaged,
    ManifestInvalid,
    NotPublished,
    ShoalError,
    StoreDamaged,
)
from shoal.engine.base.failpoints import reached
from shoal.engine.format.catalog import ViewRecord
from shoal.engine.format.paths import DATA, generation_path
from shoal.engine.root.directory_storage import sync_directory
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.root.manifest import Manifest
from shoal.engine.store.disk import make_file, store_full_named
from shoal.loaders.apply.entries import build_base, forget_overlays, load_snapshot
from shoal.loaders.apply.remote_views import register
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.follow.plan import LoadSnapshot, newest_snapshot, next_step
from shoal.loaders.scrub.rereading import ChunkGone, Rereader
from shoal.loaders.segments.generation import Progress, clear_unfinished

log = logging.getLogger("shoal.writer")

Started = Callable[[LoadSnapshot], Progress]
"""A function that is called before a snapshot is loaded, with the reason. It returns the function to report progress
to."""


def repair(writer: StoreWriter, root: ExportRoot, view: str, damage: StoreDamaged, started: Started) -> Manifest | None:
    """Repair a view with damaged data.

    A damaged base is built again from its snapshot, and its overlays stay. But if the base holds pushed rows and is
    intact on the disk, its file is copied from the disk instead. If overlays are damaged, the view goes back to its
    base. If that is impossible, the view starts over from the newest snapshot. The caller then applies later entries of
    the log as usual.

    Returns:
        The snapshot that was loaded, or None.

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
        raise StoreDamaged(f"{damage}; the repair failed: {error}") from error


def _taken_from_disk(writer: StoreWriter, view: str, record: ViewRecord) -> bool:
    """Replace a base's file by a copy of the file on the disk. If the base is damaged only in memory, this keeps its
    pushed rows.

    Return whether that succeeded.
    """
    base = record.base
    directory = generation_path(writer.store, view, base.id)
    copy = directory / f"{DATA}.copy"
    try:
        with store_full_named(directory):
            make_file(copy)
            Rereader().copy_from_disk(directory / DATA, copy, base)
            # Readers keep their map of the old file until they see the new record.
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
    """Log how many pushed rows are lost. Pushed rows exist only in the store, so those in damaged segments are lost."""
    readable = writer.readable(view)
    whole = {segment.record.id for segment in readable.segments} if readable else set()
    lost = sum(segment.pushed for segment in (record.base, *record.overlays) if segment.id not in whole)
    if lost:
        log.error("%s: %d pushed rows were in damaged segments, and are lost", view, lost)


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
        # The root may not have the base: a base that this node built by folding was never published.
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
    # The snapshot may be older than the view, so its schema need not be a valid successor of the view's schema.
    is_earlier = record is not None and manifest.seq <= record.applied_seq
    load_snapshot(writer, root, manifest, started(LoadSnapshot(manifest, reason)), accept_schema_change=is_earlier)
    return manifest


def _check_lineage(root: ExportRoot, view: str, record: ViewRecord) -> None:
    """Raise ForeignDelta if the view came from a different root: the entries of this root cannot replace the view's
    data."""
    with suppress(DeltaGap, ManifestInvalid):
        next_step(root, view, record)


def _remove(writer: StoreWriter, view: str, generation_id: str) -> None:
    shutil.rmtree(generation_path(writer.store, view, generation_id), ignore_errors=True)
    reached("repair.base-removed")
