"""Bring views of a store up to date with an export root."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Protocol

from shoal.engine.base.errors import (
    FileDamaged,
    LineageError,
    ManifestInvalid,
    NotPublished,
    RootUnreadable,
    SchemaChangeRefused,
    ShoalError,
    StoreDamaged,
    StoreFull,
    StoreMoved,
)
from shoal.engine.format.catalog import ViewRecord
from shoal.engine.root.export_root import ExportRoot
from shoal.loaders.apply.compaction import merge_overlays
from shoal.loaders.apply.definition import follow_drops
from shoal.loaders.apply.entries import apply_delta, load_snapshot
from shoal.loaders.apply.remote_views import check_can_be_loaded, register
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.follow.plan import ApplyDelta, LoadSnapshot, fallback_snapshot, next_step
from shoal.loaders.follow.repair import repair

log = logging.getLogger("shoal.writer")


@dataclass(frozen=True)
class AppliedEntry:
    """An applied entry, or the removal of a view that the root dropped (kind `drop`).

    `rows` is the number of changed rows in the store, and `seconds` is the duration. `reason` says why a snapshot was
    loaded, or why the view was removed.
    """

    view: str
    kind: str
    seq: int
    rows: int
    tombstones: int
    seconds: float
    reason: str | None = None


class Observer(Protocol):
    """Receives the progress of a load."""

    def started(self, step: LoadSnapshot | ApplyDelta) -> Callable[[int], None]:
        """Handle the start of a step. Return a function to call with the number of additional rows written."""

    def finished(self, applied: AppliedEntry) -> None:
        """Handle the commit of a step."""

    def failed(self, view: str, error: ShoalError) -> None:
        """Handle the failure of a view, which keeps its last version."""


class NullObserver:
    """An observer that does nothing."""

    def started(self, step: LoadSnapshot | ApplyDelta) -> Callable[[int], None]:
        return lambda rows: None

    def finished(self, applied: AppliedEntry) -> None:
        pass

    def failed(self, view: str, error: ShoalError) -> None:
        pass


def catch_up(
    writer: StoreWriter, root: ExportRoot, view: str, observer: Observer, *, accept_schema_change: bool = False
) -> list[AppliedEntry]:
    """Apply the entries of a view's log that the store lacks, one at a time. A pinned view is not changed.

    If an entry cannot be applied, load a newer snapshot instead. If the view's data in the store is damaged, repair it
    first.

    Raises:
        ShoalError: an entry cannot be applied; earlier entries are applied, and the error is recorded in the store.
    """
    applied: list[AppliedEntry] = []
    try:
        with _failures_named(root):
            writer.check_in_place()
            if (damage := writer.damage(view)) is not None:
                applied += _repair(writer, root, view, damage, observer)
            root.check_exists()
            while step := _advance(writer, root, view, observer, accept_schema_change):
                applied.append(step)
                observer.finished(step)
                merge_overlays(writer, view)
        return applied
    except ShoalError as error:
        observer.failed(view, error)
        # If the disk has no room for the data, it may have none for the error record either.
        with suppress(StoreFull, StoreMoved):
            writer.note_trouble(view, error)
        raise


def load(
    writer: StoreWriter,
    root: ExportRoot,
    observer: Observer,
    *,
    views: Sequence[str] = (),
    accept_schema_change: bool = False,
) -> list[AppliedEntry]:
    """Bring the given views, or all views, up to date with a root. If one view or the feature services fail, the other
    views are still loaded.

    Raises:
        NotPublished: the root or a given view does not exist, or the root has no views.
        ShoalError: the first failure, after every view was tried.
    """
    with _failures_named(root):
        root.check_exists()
        published = root.views()
    for view in views:
        if view not in published:
            known = ", ".join(published) or "none"
            raise NotPublished(f"{root} has no view {view!r}; it has {known}")
    applied = list[AppliedEntry]()
    failures = list[ShoalError]()
    try:
        applied += _drop(writer, root, observer)
    except ManifestInvalid as error:
        failures.append(error)
    if not published and not applied:
        raise NotPublished(f"{root} has no views; `shoal export --to {root}` publishes some")
    try:
        writer.commit_root(str(root), root.services())
    except ShoalError as error:
        failures.append(error)
    for view in views or published:
        try:
            applied += catch_up(writer, root, view, observer, accept_schema_change=accept_schema_change)
        except ShoalError as error:
            failures.append(error)
    if failures:
        raise failures[0]
    return applied


def _drop(writer: StoreWriter, root: ExportRoot, observer: Observer) -> list[AppliedEntry]:
    """Remove from the store the views that the root dropped."""
    started = monotonic()
    with _failures_named(root):
        removed = follow_drops(writer, root)
    reason = "the root dropped the view"
    applied = [AppliedEntry(view, "drop", seq, 0, 0, monotonic() - started, reason) for view, seq in removed.items()]
    for entry in applied:
        observer.finished(entry)
    return applied


@contextmanager
def _failures_named(root: ExportRoot) -> Iterator[None]:
    """Turn an OSError about a path inside a root into RootUnreadable."""
    try:
        yield
    except OSError as error:
        if error.filename is None or not root.is_directory or not Path(error.filename).is_relative_to(root.path):
            raise
        raise RootUnreadable(f"{root} cannot be read now: {error}; check its file system, and try again") from error


def _advance(writer: StoreWriter, root: ExportRoot, view: str, observer: Observer, accept: bool) -> AppliedEntry | None:
    record = writer.record(view)
    if record is not None and record.pinned:
        return None
    seq = record.applied_seq + 1 if record else 0
    try:
        step = next_step(root, view, record)
        if step is None:
            if record is not None:
                # The last merge may have failed because the disk was full.
                merge_overlays(writer, view)
            writer.clear_trouble(view)
            return None
        seq = step.manifest.seq
        if _begins_anew(step, record) and follow_drops(writer, root, view):
            return _advance(writer, root, view, observer, accept)
        return _take(writer, root, step, observer, accept)
    except (ManifestInvalid, FileDamaged, LineageError, SchemaChangeRefused) as error:
        with suppress(ManifestInvalid):
            if record is not None and follow_drops(writer, root, view):
                return _advance(writer, root, view, observer, accept)
        detour = fallback_snapshot(root, view, seq, error)
        if detour is None:
            raise
        return _take(writer, root, detour, observer, accept)


def _begins_anew(step: LoadSnapshot | ApplyDelta, record: ViewRecord | None) -> bool:
    """Return whether an entry does not continue the store's entries. Such an entry may belong to a later view of the
    same name."""
    return record is not None and record.applied_seq > 0 and step.manifest.parent != record.applied_entry


def _repair(
    writer: StoreWriter, root: ExportRoot, view: str, damage: StoreDamaged, observer: Observer
) -> list[AppliedEntry]:
    if view not in writer.version().troubles:
        # Loading may take long. Meanwhile, the error record explains the damage, also to processes that have the view
        # open.
        log.warning("%s: %s", view, damage)
        with suppress(StoreFull, StoreMoved):
            writer.note_trouble(view, damage)
    started = monotonic()
    manifest = repair(writer, root, view, damage, observer.started)
    writer.clear_trouble(view)
    if manifest is None:
        return []
    record = writer.record(view)
    rows = record.base.rows if record is not None else manifest.rows
    applied = AppliedEntry(view, "snapshot", manifest.seq, rows, 0, monotonic() - started, str(damage))
    observer.finished(applied)
    return [applied]


def _take(
    writer: StoreWriter, root: ExportRoot, step: LoadSnapshot | ApplyDelta, observer: Observer, accept: bool
) -> AppliedEntry:
    started = monotonic()
    manifest = step.manifest
    progress = observer.started(step)
    reason = None
    if manifest.view.is_remote:
        register(writer, manifest)
        return AppliedEntry(manifest.view.name, manifest.kind, manifest.seq, 0, 0, monotonic() - started)
    check_can_be_loaded(manifest, writer.record(manifest.view.name))
    if isinstance(step, LoadSnapshot):
        reason = step.reason
        rows = load_snapshot(writer, root, manifest, progress, accept_schema_change=accept)
        tombstones = 0
    else:
        rows, tombstones = apply_delta(writer, root, manifest)
        progress(rows + tombstones)
    seconds = monotonic() - started
    return AppliedEntry(manifest.view.name, manifest.kind, manifest.seq, rows, tombstones, seconds, reason)
