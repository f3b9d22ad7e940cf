"""Bring views of a store up to date with an export root."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Protocol

from engine.catalog import ViewRecord
from engine.errors import (
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
from engine.export_root import ExportRoot
from loaders.apply import apply_delta, load_snapshot
from loaders.compaction import merge_overlays
from loaders.definition import follow_drops
from loaders.follow import ApplyDelta, LoadSnapshot, next_step, way_around
from loaders.remote_views import check_can_be_loaded, register
from loaders.repair import repair
from loaders.store_writer import StoreWriter

log = logging.getLogger("shoal.writer")


@dataclass(frozen=True)
class Applied:
    """An applied entry, or a removed view that the root dropped (kind `drop`). `rows` is how many rows of the store
    changed, `seconds` how long that took. `reason` says why a snapshot was loaded, or the view removed."""

    view: str
    kind: str
    seq: int
    rows: int
    tombstones: int
    seconds: float
    reason: str | None = None


class Observer(Protocol):
    """Whoever wants to know how loading goes."""

    def started(self, step: LoadSnapshot | ApplyDelta) -> Callable[[int], None]:
        """A step begins; what is returned is told how many more rows were written."""

    def finished(self, applied: Applied) -> None:
        """A step was committed."""

    def failed(self, view: str, error: ShoalError) -> None:
        """A view cannot go on; its last version stands."""


class Silence:
    """An observer that says nothing."""

    def started(self, step: LoadSnapshot | ApplyDelta) -> Callable[[int], None]:
        return lambda rows: None

    def finished(self, applied: Applied) -> None:
        pass

    def failed(self, view: str, error: ShoalError) -> None:
        pass


def catch_up(
    writer: StoreWriter, root: ExportRoot, view: str, observer: Observer, *, accept_schema_change: bool = False
) -> list[Applied]:
    """Apply whatever a view's log has beyond the store, one entry at a time; a pinned view stays where it is.

    A newer snapshot leads around an entry that cannot be applied. A view whose data in the store is damaged is loaded
    again first.

    Raises:
        ShoalError: an entry cannot be applied; those before it are, and the trouble is noted in the store.
    """
    applied: list[Applied] = []
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
        # Where there is no room for the data there may be none for the note either.
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
) -> list[Applied]:
    """Catch up with a root: the views named, or all. Neither one view's failure nor that of the feature services keeps
    the others from loading.

    Raises:
        NotPublished: the root, or a view that was named, does not exist, or there is no view at all.
        ShoalError: the first failure, after every view was tried.
    """
    with _failures_named(root):
        root.check_exists()
        published = root.views()
    for view in views:
        if view not in published:
            known = ", ".join(published) or "none"
            raise NotPublished(f"{root} has no view {view!r}; it has {known}")
    applied, failures = list[Applied](), list[ShoalError]()
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


def _drop(writer: StoreWriter, root: ExportRoot, observer: Observer) -> list[Applied]:
    """Remove the views that the root dropped."""
    started = monotonic()
    with _failures_named(root):
        removed = follow_drops(writer, root)
    reason = "the root dropped the view"
    applied = [Applied(view, "drop", seq, 0, 0, monotonic() - started, reason) for view, seq in removed.items()]
    for entry in applied:
        observer.finished(entry)
    return applied


@contextmanager
def _failures_named(root: ExportRoot) -> Iterator[None]:
    """Turn what the system says of a path in a root into RootUnreadable."""
    try:
        yield
    except OSError as error:
        if error.filename is None or not root.is_directory or not Path(error.filename).is_relative_to(root.path):
            raise
        raise RootUnreadable(f"{root} cannot be read now: {error}; see to its file system, and try again") from error


def _advance(writer: StoreWriter, root: ExportRoot, view: str, observer: Observer, accept: bool) -> Applied | None:
    record = writer.record(view)
    if record is not None and record.pinned:
        return None
    seq = record.applied_seq + 1 if record else 0
    try:
        step = next_step(root, view, record)
        if step is None:
            if record is not None:
                # There may have been no room for the last merge.
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
        detour = way_around(root, view, seq, error)
        if detour is None:
            raise
        return _take(writer, root, detour, observer, accept)


def _begins_anew(step: LoadSnapshot | ApplyDelta, record: ViewRecord | None) -> bool:
    """Whether an entry does not continue what the store holds, so that it may be of a later view of the same name."""
    return record is not None and record.applied_seq > 0 and step.manifest.parent != record.applied_entry


def _repair(
    writer: StoreWriter, root: ExportRoot, view: str, damage: StoreDamaged, observer: Observer
) -> list[Applied]:
    if view not in writer.version().troubles:
        # Loading may take its time; until then this says why, also to those who have the view open still.
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
    applied = Applied(view, "snapshot", manifest.seq, rows, 0, monotonic() - started, str(damage))
    observer.finished(applied)
    return [applied]


def _take(
    writer: StoreWriter, root: ExportRoot, step: LoadSnapshot | ApplyDelta, observer: Observer, accept: bool
) -> Applied:
    started, manifest = monotonic(), step.manifest
    progress = observer.started(step)
    reason = None
    if manifest.view.is_remote:
        register(writer, manifest)
        return Applied(manifest.view.name, manifest.kind, manifest.seq, 0, 0, monotonic() - started)
    check_can_be_loaded(manifest, writer.record(manifest.view.name))
    if isinstance(step, LoadSnapshot):
        reason = step.reason
        rows, tombstones = load_snapshot(writer, root, manifest, progress, accept_schema_change=accept), 0
    else:
        rows, tombstones = apply_delta(writer, root, manifest)
        progress(rows + tombstones)
    seconds = monotonic() - started
    return Applied(manifest.view.name, manifest.kind, manifest.seq, rows, tombstones, seconds, reason)
