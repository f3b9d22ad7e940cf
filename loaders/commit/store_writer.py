"""The only writer of a store: its lock, its newest version, and the commits that create new versions.

Other modules decide what to write (`shoal.loaders.apply.entries`, `shoal.loaders.apply.compaction`). This module makes
each change visible completely, or not at all.
"""

import fcntl
import os
import shutil
import threading
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

import lmdb
import numpy as np
import numpy.typing as npt

from shoal.engine.base.errors import (
    ShoalError,
    StoreDamaged,
    StoreFull,
    StoreIsOtherShard,
    StoreLocked,
    StoreMoved,
    StoreUnreadable,
)
from shoal.engine.base.failpoints import reached
from shoal.engine.base.shards import Shard
from shoal.engine.format import catalog
from shoal.engine.format.catalog import (
    DamagedSegment,
    Origin,
    SegmentRecord,
    Trouble,
    ViewRecord,
    chunk_key,
)
from shoal.engine.format.paths import DATA, generations_path
from shoal.engine.format.schema import FeatureService, ViewSchema
from shoal.engine.process.run_directory import make_run_directory, mend_lock
from shoal.engine.store.disk import store_full_named
from shoal.engine.store.environment import LiveEnvironment, ReadTransaction
from shoal.engine.store.open_version import read_generation, read_overlay, read_version
from shoal.engine.store.segment import Chunk, Segment
from shoal.engine.store.version import StoreVersion, ViewVersion
from shoal.loaders.commit.group_commit import Change, GroupCommit
from shoal.loaders.commit.live_replacement import WritableLive
from shoal.loaders.commit.request_log import RequestLog
from shoal.loaders.segments.generation import clear_dead_folds
from shoal.loaders.segments.segment_writer import ChunkBuilder

LOCK = "writer.lock"
_MEND_OF_LOCKED = (
    "stop it first. If it is a server, it applies new publications of its export root by itself; `shoal reload` makes "
    "it do so now, and it accepts pushes over HTTP"
)


@dataclass(frozen=True)
class NewOverlay:
    """An overlay's record and its chunks, sealed but not stored yet."""

    record: SegmentRecord
    chunks: Sequence[npt.NDArray[np.uint8]]

    def segment(self) -> Segment:
        """Return the overlay as a segment for lookups, in the memory that it was built in."""
        return Segment(self.record, [Chunk(chunk.data, self.record.id) for chunk in self.chunks])


class StoreWriter:
    """The right to write to a store, held until `close`. Its methods may be called from several threads.

    Args:
        gather_seconds: how long a heartbeat waits for heartbeats of other views, to commit them together.
        shard: the shard that the store must hold. A new store becomes this shard for ever. If None, the store is opened
            with whatever rows it holds.

    Raises:
        StoreLocked: another process holds the right to write.
        StoreIsOtherShard: the store holds another shard, or all rows.
        RunDirectoryPrivate: another user holds the right to write, or held it before.
    """

    def __init__(
        self,
        store: str | os.PathLike[str],
        *,
        kept_generations: int = 2,
        shard: Shard | None = None,
        gather_seconds: float = 0.0,
    ) -> None:
        self.store = store = Path(store)
        self._heartbeats = GroupCommit(gather_seconds)
        self.kept_generations = kept_generations
        self.folding: dict[str, str] = {}
        """View → the newest overlay in a running fold into a new base. This overlay and all older ones must not
        change."""
        self._committing = threading.RLock()
        self._changing: defaultdict[str, threading.RLock] = defaultdict(threading.RLock)
        with store_full_named(store), ExitStack() as unless_open:
            self._lock_file = unless_open.enter_context(lock_store(store))
            reached("writer.locked")
            self._writable = WritableLive(store)
            self._version = read_version(store, self._live, None)
            if shard is not None:
                self._take_shard(shard)
            unless_open.pop_all()
        for view, version in self._version.views.items():
            clear_dead_folds(store, view)
            self._remove_unreferenced(view, version.record)
        self._clear_unknown_views()
        for view in self._version.damaged:
            # If there is no room for the note, readers still find the damage.
            if (damage := self.damage(view)) is not None:
                with suppress(StoreFull, StoreMoved):
                    self.note_trouble(view, damage)

    def _take_shard(self, shard: Shard) -> None:
        """Record the shard of a new store. Raise StoreIsOtherShard if the store holds another shard, or all rows."""
        found = self._version.shard
        if found == shard:
            return
        is_new = not self._version.names and not any((self.store / "generations").glob("*/*"))
        if found is not None or not is_new:
            raise StoreIsOtherShard.of(self.store, found, shard)
        with self._writable.transaction() as transaction:
            record = self._version.store.model_copy(update={"shard": str(shard)})
            catalog.write_store(transaction, self._live.catalog, record)
        self._version = read_version(self.store, self._live, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give up the right to write."""
        self._writable.close()
        self._lock_file.close()

    def sync(self) -> None:
        """Sync the record of the store's progress to the disk, because the process is about to end."""
        self._writable.sync()

    def check_in_place(self) -> None:
        """Check that commits still go to the store's path, where the next process looks for them.

        Raises:
            StoreMoved: the store was moved, deleted or replaced under this process. The caller must then acknowledge
                nothing.
        """
        self._writable.check_in_place()

    def mend_lock(self) -> None:
        """Lock the store again if its lock file was removed.

        Raises:
            StoreLocked: another process has begun to write to the store.
            OSError: the lock file cannot be created.
        """
        path = make_run_directory(self.store) / LOCK
        try:
            if mend_lock(path, self._lock_file.fileno()):
                _note_holder(self._lock_file)
        except BlockingIOError:
            raise StoreLocked(f"{path} was removed, and another process has written to the store since") from None

    @property
    def _live(self) -> LiveEnvironment:
        return self._writable.live

    @property
    def requests(self) -> RequestLog:
        """The record of applied pushes, by request id."""
        return RequestLog(self._live)

    @property
    def shard(self) -> Shard | None:
        """The shard that the store holds; None if it holds all rows."""
        return self._version.shard

    def version(self) -> StoreVersion:
        """Return the newest version. Only this writer creates newer ones."""
        with self._committing:
            if self._live.last_transaction() != self._version.id or self._version.damaged:
                # Do not build new versions on data that can no longer be read.
                self._version = read_version(self.store, self._live, self._version, keep_readable=False)
            return self._version

    def record(self, view: str) -> ViewRecord | None:
        """Return a view's record in the newest version; None if the view was never loaded, or its record cannot be
        read."""
        return self.version().record(view)

    def readable(self, view: str) -> ViewVersion | None:
        """Return a view's newest version. If the view is damaged, return a version with only its readable segments.
        Return None if nothing can be read."""
        with self._committing:
            version = self.version()
            record = self.record(view)
            if record is None:
                return None
            transaction = ReadTransaction(self._live)
            segments = []
            for overlay in record.overlays:
                if version.note_of(overlay) is None:
                    with suppress(StoreDamaged):
                        segments.append(read_overlay(transaction, overlay))
            if version.note_of(record.base) is None:
                with suppress(StoreDamaged):
                    segments.append(read_generation(self.store, record.base))
            whole = len(segments) == 1 + len(record.overlays)
            if whole and view in version.views:
                return version.views[view]
            return ViewVersion(record, segments, transaction) if segments else None

    def is_pushed_to(self, view: str) -> bool:
        """Return whether rows were ever pushed to a view. If so, the keys that the view's log removes are remembered
        too."""
        with self._committing, self._live.env.begin() as transaction:
            return catalog.is_pushed_to(transaction, self._live.catalog, view)

    def note_pushed_to(self, transaction: lmdb.Transaction, view: str) -> None:
        """Note, in the transaction of a push, that rows were pushed to a view."""
        catalog.note_pushed_to(transaction, self._live.catalog, view)

    def damage(self, view: str) -> StoreDamaged | None:
        """Check a view's data again, and return the damage. Return None if the data is intact, or if this cannot be
        determined now."""
        # Hold the lock: a fold that commits meanwhile would remove the base during the check.
        with self._committing:
            version = self.version()
            if view in version.damaged:
                found = version.damaged[view]
                return StoreDamaged(found.message) if issubclass(found.kind, StoreDamaged) else None
            try:
                if view in version.views:
                    read_generation(self.store, version.views[view].record.base)
            except StoreDamaged as error:
                return error
            except StoreUnreadable:
                pass
            return None

    def is_whole(self, base: SegmentRecord) -> bool:
        """Return whether a base generation can be read and is not noted as damaged.

        Raises:
            StoreUnreadable: this cannot be determined now.
        """
        if self.version().note_of(base) is not None:
            return False
        try:
            read_generation(self.store, base)
        except StoreDamaged:
            return False
        return True

    def note_damage(self, view: str, segment: SegmentRecord, message: str) -> bool:
        """Note that the bytes of a segment are wrong. From this commit on, no process serves the view from the segment.

        Returns:
            Whether the note is new. A segment that the view no longer has is not noted.

        Raises:
            StoreFull: there is no room for the note.
        """
        with self._committing:
            record = self.record(view)
            noted = self.version().noted.get(view, ())
            note = DamagedSegment.of(segment, message, datetime.now(UTC))
            is_had = record is not None and any(note.is_of(had) for had in record.segments)
            if record is None or not is_had or catalog.note_of(segment, noted) is not None:
                return False
            with self._writable.transaction() as transaction:
                catalog.write_damage(transaction, self._live.catalog, view, (*noted, note))
                if any(note.is_of(served) for served in record.served):
                    trouble = Trouble(code=StoreDamaged.__name__, message=message, since=note.since)
                    catalog.write_trouble(transaction, self._live.catalog, view, trouble)
            reached("scrub.damage-noted")
            return True

    def forget_damage(self, view: str, segment: SegmentRecord) -> None:
        """Remove the note about a damaged segment that turned out to be intact.

        Raises:
            StoreFull: there is no room for the removal; the note stays.
        """
        with self._committing:
            noted = self.version().noted.get(view, ())
            others = tuple(note for note in noted if not note.is_of(segment))
            if others == noted:
                return
            with self._writable.transaction() as transaction:
                catalog.write_damage(transaction, self._live.catalog, view, others)
            trouble = self.version().troubles.get(view)
            if view not in self.version().damaged and trouble and trouble.code == StoreDamaged.__name__:
                self.clear_trouble(view)

    def check_sources(self, view: str, segments: Iterable[Segment]) -> None:
        """Verify the checksums of segments before their rows are copied into another segment.

        Without this check, a copy of wrong bytes would get a correct checksum.

        Raises:
            StoreDamaged: a segment is damaged; the damage is noted.
        """
        for segment in segments:
            try:
                for chunk in segment.chunks:
                    chunk.verify_checksum()
            except StoreDamaged as error:
                self.note_damage(view, segment.record, str(error))
                raise

    @contextmanager
    def overlay_chunk(self, overlay: SegmentRecord, number: int) -> Iterator[tuple[Path, memoryview] | None]:
        """Yield the path of LMDB's file, and the bytes of one chunk of an overlay in LMDB's memory map. Yield None if
        the overlay is gone.

        The bytes are valid only inside the `with` block. Keep the block short: LMDB reuses no page meanwhile.
        """
        live = self._live
        transaction = live.env.begin(buffers=True)
        try:
            value = transaction.get(chunk_key(overlay.id, number), db=live.segments)
            yield (live.path / DATA, value) if value is not None else None
        finally:
            transaction.abort()

    def changing(self, view: str) -> threading.RLock:
        """Return a view's lock. Take the lock before reading the view's rows, and hold it until the commit that depends
        on these rows."""
        with self._committing:
            return self._changing[view]

    def commit_view(
        self,
        view: str,
        change: Callable[[ViewRecord | None], ViewRecord | None],
        overlay: NewOverlay | None = None,
        *,
        also: Callable[[lmdb.Transaction], None] | None = None,
    ) -> ViewRecord | None:
        """Replace a view's record with the result of `change`, and store a new overlay, in one transaction.

        `change` receives the newest record. `change` runs while no other commit can happen, and may give a generation
        its final name. If `change` returns None, nothing is written. `also` may write more in the same transaction.
        Overlays and generations that the new record does not name are removed; a version that is still in use keeps the
        data that it needs. The view's noted trouble is cleared if the view moved to another log entry, or was pinned or
        unpinned.

        Raises:
            StoreFull: there is no room; the last version stays in use.
        """
        with self._committing:
            old = self.record(view)
            new = change(old)
            if new is None:
                return None
            is_lost = old is None and view in self.version().damaged
            with self._writable.transaction() as transaction:
                if overlay is not None:
                    for number, chunk in enumerate(overlay.chunks):
                        key = chunk_key(overlay.record.id, number)
                        transaction.put(key, chunk.data, db=self._live.segments)
                if is_lost:
                    self._remove_overlays(transaction, view, but=new.overlays)
                self._delete_overlays(transaction, set(old.overlays if old else ()) - set(new.overlays))
                self._write_record(transaction, view, new)
                if also is not None:
                    also(transaction)
                if old is None or (old.applied_entry, old.pinned) != (new.applied_entry, new.pinned):
                    catalog.write_trouble(transaction, self._live.catalog, view, None)
                self._forget_gone(transaction, view, new)
                reached("commit.written")
            reached("commit.done")
            self._writable.committed()
            if old is None or (old.base, old.kept) != (new.base, new.kept):
                self._remove_unreferenced(view, new)
            return new

    def commit_heartbeat(self, view: str, change: Change) -> ViewRecord | None:
        """Replace a view's record without new rows, in one commit with other views' heartbeats; see `GroupCommit`.

        Raises:
            StoreFull: there is no room; the last version stays in use.
        """
        return self._heartbeats.submit(view, change, self._commit_records)

    def _commit_records(self, changes: Mapping[str, Change]) -> dict[str, ViewRecord]:
        """Replace the records of several views in one transaction, without new rows; see `GroupCommit`."""
        with self._committing:
            version = self.version()
            old = {view: version.record(view) for view in changes}
            new = {view: change(before) for view, change in changes.items() if (before := old[view]) is not None}
            records = {view: record for view, record in new.items() if record is not None}
            if not records:
                return {}
            with self._writable.transaction() as transaction:
                for view, record in records.items():
                    self._write_record(transaction, view, record)
                    catalog.write_trouble(transaction, self._live.catalog, view, None)
                reached("commit.written")
            reached("commit.done")
            self._writable.committed()
            return records

    def _write_record(self, transaction: lmdb.Transaction, view: str, record: ViewRecord) -> None:
        """Write a view's record. If older versions of Shoal do not know all members of the record, make these versions
        refuse the store."""
        catalog.write_view(transaction, self._live.catalog, view, record)
        store = self.version().store
        if record.needs_format_2 and store.format_version == 1:
            catalog.write_store(transaction, self._live.catalog, store.model_copy(update={"format_version": 2}))

    def remove_view(self, view: str) -> None:
        """Remove a view and all its data from the store; versions still in use keep their rows.

        Raises:
            StoreFull: there is no room to record the removal; the view stays.
        """
        with self._committing:
            record = self.record(view)
            with self._writable.transaction() as transaction:
                if record is not None:
                    self._delete_overlays(transaction, record.overlays)
                else:
                    self._remove_overlays(transaction, view, but=())
                catalog.delete_view(transaction, self._live.catalog, view)
                catalog.write_damage(transaction, self._live.catalog, view, ())
                catalog.write_trouble(transaction, self._live.catalog, view, None)
                reached("commit.written")
            reached("commit.done")
            shutil.rmtree(generations_path(self.store, view), ignore_errors=True)
            reached("commit.base-removed")

    def _forget_gone(self, transaction: lmdb.Transaction, view: str, record: ViewRecord) -> None:
        """Remove the notes of damaged segments that a view no longer has."""
        noted = self.version().noted.get(view, ())
        left = tuple(note for note in noted if any(note.is_of(segment) for segment in record.segments))
        if left != noted:
            catalog.write_damage(transaction, self._live.catalog, view, left)

    def _delete_overlays(self, transaction: lmdb.Transaction, overlays: Iterable[SegmentRecord]) -> None:
        for gone in overlays:
            for number in range(gone.chunks):
                transaction.delete(chunk_key(gone.id, number), db=self._live.segments)

    def commit_root(self, root: str, services: tuple[FeatureService, ...]) -> None:
        """Record the export root of the store, and its feature services, if either has changed."""
        with self._committing:
            version = self.version()
            if version.store.root == root and tuple(version.services.values()) == services:
                return
            with self._writable.transaction() as transaction:
                record = version.store.model_copy(update={"root": root})
                catalog.write_store(transaction, self._live.catalog, record)
                catalog.write_services(transaction, self._live.catalog, services)

    def note_trouble(self, view: str, error: ShoalError) -> None:
        """Note the error that keeps a view from following its log, unless the same error is noted already."""
        code = type(error).__name__
        message = str(error)
        with self._committing:
            known = self.version().troubles.get(view)
            if known and (known.code, known.message) == (code, message):
                return
            since = known.since if known and known.code == code else datetime.now(UTC)
            with self._writable.transaction() as transaction:
                trouble = Trouble(code=code, message=message, since=since)
                catalog.write_trouble(transaction, self._live.catalog, view, trouble)

    def clear_trouble(self, view: str) -> None:
        """Remove the noted trouble of a view, if there is any."""
        with self._committing:
            if view in self.version().troubles:
                with self._writable.transaction() as transaction:
                    catalog.write_trouble(transaction, self._live.catalog, view, None)

    def _clear_unknown_views(self) -> None:
        """Remove the files that an interrupted definition or removal of a view left. Keep unfinished first loads, so
        that they can be resumed.

        Remove nothing if the catalog has no views. Such a catalog may be new, and the store's owner may be about to
        replace it with a catalog that has all the views.
        """
        known = {*self._version.views, *self._version.damaged}
        for directory in (self.store / "generations").iterdir() if known else ():
            if directory.name not in known:
                clear_dead_folds(self.store, directory.name)
                self._remove_generations(directory, but=frozenset())
                with suppress(OSError):
                    directory.rmdir()

    def _remove_overlays(self, transaction: lmdb.Transaction, view: str, *, but: Sequence[SegmentRecord]) -> None:
        """Remove all overlays of a view except `but`. Find the overlays by their keys, because no record lists them."""
        named = {overlay.id for overlay in but}
        prefix = f"{view}.".encode()
        keys = [bytes(key) for key, _ in transaction.cursor(db=self._live.segments)]
        for key in keys:
            if key.startswith(prefix) and key.decode().partition("/")[0] not in named:
                transaction.delete(key, db=self._live.segments)

    def _remove_unreferenced(self, view: str, record: ViewRecord) -> None:
        named = frozenset((record.base.id, *(kept.id for kept in record.kept)))
        self._remove_generations(generations_path(self.store, view), but=named)

    def _remove_generations(self, directory: Path, *, but: frozenset[str]) -> None:
        for entry in directory.iterdir() if directory.is_dir() else ():
            if entry.name not in but and not entry.name.startswith("."):
                shutil.rmtree(entry, ignore_errors=True)
                reached("commit.base-removed")


def seal_overlay(
    schema: ViewSchema,
    chunks: Sequence[ChunkBuilder],
    origins: tuple[Origin, ...],
    *,
    first_seq: int,
    last_seq: int,
    last_entry: str,
    watermark: datetime | None,
) -> NewOverlay:
    """Make an overlay of filled chunks, with an id that was never used before. The other arguments are as in
    `SegmentRecord`."""
    sealed = [chunk.finish() for chunk in chunks]
    rows = sum(chunk.rows for chunk in chunks)
    tombstones = sum(chunk.tombstones for chunk in chunks)
    record = SegmentRecord(
        id=f"{schema.name}.{first_seq}-{last_seq}.{uuid.uuid4().hex[:8]}",
        view_schema=schema,
        origins=origins,
        first_seq=first_seq,
        last_seq=last_seq,
        last_entry=last_entry,
        chunks=len(sealed),
        rows=rows - tombstones,
        tombstones=tombstones,
        pushed=sum(chunk.pushed for chunk in chunks),
        bytes=sum(chunk.size for chunk in sealed),
        watermark=watermark,
        created_at=datetime.now(UTC),
    )
    return NewOverlay(record, sealed)


def lock_store(store: Path, mend: str = _MEND_OF_LOCKED) -> TextIO:
    """Take the right to write to a store, until the returned file is closed.

    Args:
        mend: the fix that the error message names if another process holds the right to write.

    Raises:
        StoreLocked: another process holds the right to write.
        RunDirectoryPrivate: another user holds the right to write, or held it before.
    """
    path = make_run_directory(store) / LOCK
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise StoreLocked(f"{path.parent.parent} is being written by process {holder}; {mend}") from None
    try:
        _note_holder(file)
    except OSError:
        file.close()
        raise
    return file


def _note_holder(lock_file: TextIO) -> None:
    lock_file.truncate(0)
    lock_file.write(str(os.getpid()))
    lock_file.flush()
