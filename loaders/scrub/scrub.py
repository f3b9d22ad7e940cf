"""Reread a served store chunk by chunk and record damaged chunks, so that a flipped bit is not served forever.

The scrub is a thread of the writer's process. `shoal.loaders.scrub.scrub_pace` chooses the next chunk and its time.
`shoal.loaders.scrub.rereading` reads the chunk. `StoreWriter.note_damage` records damage, and the writer repairs
damaged views as usual. The progress is stored with `shoal.engine.status.scrubbed`. So a restarted writer continues
where the last writer stopped. It rereads the store at once if the store was not closed cleanly.

If the disk's scheduler supports priorities, the thread's reads wait behind all other reads. The thread keeps the CPU
priority of the writer. If a thread of idle priority waited for Python's interpreter lock, the writer's other threads
would have to wait until it has taken the lock.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from shoal.engine.base.errors import ShoalError, StoreDamaged, StoreFull, StoreUnreadable
from shoal.engine.format.catalog import SegmentRecord
from shoal.engine.format.paths import DATA, generation_path
from shoal.engine.status.scrubbed import (
    Scrubbed,
    forget_scrubbed,
    read_scrubbed,
    scrubbed_path,
    write_scrubbed,
)
from shoal.engine.store.open_version import read_generation
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.scrub.rereading import ChunkGone, Rereader
from shoal.loaders.scrub.scheduling import let_others_read_first
from shoal.loaders.scrub.scrub_pace import Unit, pause_seconds, plan

log = logging.getLogger("shoal.writer")

_LOOK_SECONDS = 30.0
"""The longest time between two looks for new segments."""
_WRITE_SECONDS = 2.0
_RETRY_SECONDS = 60.0
_STOP_SECONDS = 2.0


@dataclass(frozen=True)
class _Part:
    """A segment of a view, and whether it is a base or an overlay."""

    view: str
    segment: SegmentRecord
    is_overlay: bool

    @property
    def key(self) -> str:
        """The segment's name in the progress. It includes the creation time because a repaired base keeps its id."""
        return f"{self.view}/{self.segment.id}/{self.segment.created_at.isoformat()}"


class Scrub:
    """The scrub of one store.

    Args:
        period_seconds: the time within which each chunk must be verified again.
        found: called on the scrub's thread with the name of each view that turns out to be damaged, or intact again.
    """

    def __init__(self, writer: StoreWriter, period_seconds: float, found: Callable[[str], None]) -> None:
        self._writer = writer
        self._period_seconds = period_seconds
        self._found = found
        self._reader = Rereader()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scrub", daemon=True)
        self._written, self._is_unwritten = 0.0, True
        before = read_scrubbed(writer.store)
        is_clean = before is not None and before.clean
        self._is_suspect = not is_clean
        self._scrubbed = Scrubbed(period_seconds=period_seconds) if before is None else before
        self._change(
            period_seconds=period_seconds,
            clean=False,
            suspect_since=self._scrubbed.suspect_since if is_clean else time.time(),
        )
        parts = self._parts()
        self._keep_up(parts)
        self._doubt_noted(parts)

    def start(self) -> None:
        """Start the scrub. From now on, the store counts as closed cleanly only after `stop` was called."""
        self._write(durable=True)
        if self._is_suspect and self._scrubbed.suspect_chunks:
            log.info("the store was not closed cleanly: all %d chunks are verified now", self._scrubbed.suspect_chunks)
        self._thread.start()

    def stop(self) -> None:
        """Stop the scrub, and record that the store was closed cleanly."""
        self._stopped.set()
        self._thread.join(_STOP_SECONDS)
        if self._thread.is_alive():
            # The thread is blocked in a read of a disk that does not respond, so the state of the store is unknown.
            log.error("the scrub does not stop; the next writer verifies the whole store")
            return
        self._change(clean=True)
        self._write(durable=True)

    # --- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        let_others_read_first()
        while not self._stopped.is_set():
            try:
                wait = self._step()
            except ShoalError as error:
                log.error("the scrub cannot continue now: %s", error)
                wait = _RETRY_SECONDS
            except Exception:
                log.exception("the scrub met an unexpected error; it continues in %g s", _RETRY_SECONDS)
                wait = _RETRY_SECONDS
            self._rest(wait)

    def _rest(self, seconds: float) -> None:
        """Wait, and write the progress again if its file was removed. Without the file, the next writer would verify
        the whole store."""
        until = time.monotonic() + seconds
        noted = scrubbed_path(self._writer.store)
        while (left := until - time.monotonic()) > 0 and not self._stopped.wait(min(left, _WRITE_SECONDS)):
            if noted.parent.is_dir() and not noted.exists():
                self._write(durable=False)

    def _step(self) -> float:
        """Verify the next chunk if it is due. Return the seconds to wait before the next step."""
        parts = self._parts()
        self._keep_up(parts)
        units = [unit for part in parts.values() for unit in self._units(part)]
        if not units:
            return _LOOK_SECONDS
        suspect_since = self._scrubbed.suspect_since
        now = time.time()
        following = plan(units, now=now, period_seconds=self._period_seconds, suspect_since=suspect_since)
        if following.wait_seconds > 0:
            if self._is_unwritten:
                self._write(durable=False)
            return min(following.wait_seconds, _LOOK_SECONDS)
        part = parts[following.unit.segment]
        chunks = range(following.unit.chunk, following.unit.chunk + 1)
        try:
            if self._is_noted(part):
                chunks = range(part.segment.chunks)
                self._verify_noted(part, following.bytes_per_second)
            else:
                self._verify(part, following.unit.chunk, following.bytes_per_second)
        except OSError as error:
            log.error("%s cannot be verified now: %s", part.key, error)
            return _RETRY_SECONDS
        if self._stopped.is_set():
            return 0.0
        self._note_verified(part, chunks, now)
        return 0.0

    def _verify(self, part: _Part, chunk: int, bytes_per_second: float) -> None:
        """Verify a chunk, and record it if it is damaged. Raise OSError if the chunk cannot be read now, or the damage
        cannot be recorded."""
        try:
            self._read(part, chunk, bytes_per_second)
        except StoreDamaged as error:
            self._note_damaged(part, str(error))

    def _read(self, part: _Part, chunk: int, bytes_per_second: float) -> None:
        """Read a chunk at a given pace, and return early if the scrub is stopped.

        Raises:
            StoreDamaged: the chunk is damaged or missing.
            OSError: the chunk cannot be read now.
        """
        started = time.monotonic()
        try:
            for size in self._blocks(part, chunk):
                took = time.monotonic() - started
                self._change(bytes_verified=self._scrubbed.bytes_verified + size)
                if self._stopped.wait(pause_seconds(size, took, bytes_per_second)):
                    return
                started = time.monotonic()
            if not part.is_overlay and chunk == part.segment.chunks - 1:
                # Check also the file's length, and that the chunks match the catalog; checksums do not cover these.
                read_generation(self._writer.store, part.segment)
        except ChunkGone as error:
            raise StoreDamaged(f"{error} is missing, though the catalog names it") from None
        except StoreUnreadable as error:
            raise OSError(str(error)) from error

    def _blocks(self, part: _Part, chunk: int) -> Iterator[int]:
        segment = part.segment
        if part.is_overlay:
            origin = f"overlay {segment.id} chunk {chunk}"
            return self._reader.overlay_chunk(partial(self._writer.overlay_chunk, segment, chunk), origin)
        path = generation_path(self._writer.store, part.view, segment.id)
        return self._reader.base_chunk(path / DATA, segment.offsets[chunk], f"generation {path} chunk {chunk}")

    # --- what is found -------------------------------------------------------------------------------------------

    def _note_damaged(self, part: _Part, message: str) -> None:
        """Record that a segment is damaged, unless it was replaced while it was being read."""
        try:
            is_new = self._writer.note_damage(part.view, part.segment, message)
        except StoreFull as error:
            # The chunk does not count as verified, so the scrub finds the damage again after a pause.
            log.error("%s: %s; this damage cannot be recorded: %s", part.view, message, error)
            raise OSError(str(error)) from error
        if is_new:
            log.error("%s: the scrub found damage: %s", part.view, message)
            self._change(damaged_chunks=self._scrubbed.damaged_chunks + 1)
            self._write(durable=False)
            self._found(part.view)

    def _is_noted(self, part: _Part) -> bool:
        return self._writer.version().note_of(part.segment) is not None

    def _verify_noted(self, part: _Part, bytes_per_second: float) -> None:
        """Remove the damage record of a segment if all its chunks are intact again.

        The store's owner may have restored the file, or the fault may have been in memory only.
        """
        try:
            for chunk in range(part.segment.chunks):
                self._read(part, chunk, bytes_per_second)
        except StoreDamaged:
            return
        if self._stopped.is_set():
            return
        try:
            self._writer.forget_damage(part.view, part.segment)
        except StoreFull as error:
            raise OSError(str(error)) from error
        log.info("%s: %s was damaged and is intact again", part.view, part.segment.id)
        self._found(part.view)

    # --- progress ------------------------------------------------------------------------------------------------

    def _parts(self) -> dict[str, _Part]:
        """Return all segments of the store, by their names in the progress."""
        version = self._writer.version()
        parts = []
        for view in {*version.views, *version.damaged}:
            record = version.record(view)
            if record is not None and not record.view_schema.is_remote:
                parts += [_Part(view, overlay, is_overlay=True) for overlay in record.overlays]
                parts += [_Part(view, base, is_overlay=False) for base in (record.base, *record.kept)]
        return {part.key: part for part in parts}

    def _keep_up(self, parts: dict[str, _Part]) -> None:
        """Add new segments to the progress, and remove those that no longer exist."""
        known = self._scrubbed.chunks
        now = time.time()
        chunks = {}
        for key, part in parts.items():
            times = known.get(key, ())
            made = min(part.segment.created_at.timestamp(), now)
            # If the clock was ahead before, recorded times may lie in the future.
            is_fitting = len(times) == part.segment.chunks and all(time <= now for time in times)
            chunks[key] = times if is_fitting else (made,) * part.segment.chunks
        if chunks != known:
            self._change(chunks=chunks)

    def _doubt_noted(self, parts: dict[str, _Part]) -> None:
        """Schedule segments with recorded damage first, because the store's owner may have restored them."""
        noted = {key: (0.0,) * part.segment.chunks for key, part in parts.items() if self._is_noted(part)}
        self._change(chunks=self._scrubbed.chunks | noted)

    def _units(self, part: _Part) -> Iterator[Unit]:
        size = part.segment.bytes // max(1, part.segment.chunks)
        for chunk, verified in enumerate(self._scrubbed.chunks[part.key]):
            yield Unit(part.key, chunk, size, verified)

    def _note_verified(self, part: _Part, chunks: range, began: float) -> None:
        was_suspect = self._scrubbed.suspect_chunks
        times = list(self._scrubbed.chunks.get(part.key, ()))
        for chunk in chunks:
            times[chunk] = began
        self._change(chunks=self._scrubbed.chunks | {part.key: tuple(times)})
        if was_suspect and not self._scrubbed.suspect_chunks:
            log.info("the whole store was verified, because it was not closed cleanly")
        if time.monotonic() > self._written + _WRITE_SECONDS:
            self._write(durable=False)

    def _change(self, **changes: object) -> None:
        self._scrubbed = self._scrubbed.model_copy(update=changes)
        self._is_unwritten = True

    def _write(self, *, durable: bool) -> None:
        self._written = time.monotonic()
        self._is_unwritten = False
        try:
            write_scrubbed(self._writer.store, self._scrubbed, durable=durable)
        except OSError as error:
            log.error("the progress of the scrub cannot be written: %s", error)


def no_scrub(writer: StoreWriter) -> None:
    """Remove the scrub's progress, because this writer runs without a scrub. The next scrub then verifies the whole
    store."""
    with suppress(OSError, ShoalError):
        forget_scrubbed(writer.store)
