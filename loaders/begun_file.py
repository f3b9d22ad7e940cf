"""The writer's end of the record of how far a store got: see `engine.begun`.

A commit costs one write into a file whose blocks are there already, and waits for no disk. A thread syncs the file
every second. That it cannot be written fails no commit: the record is then further behind, and says less about a loss.
"""

import contextlib
import logging
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

from engine.begun import FILE_BYTES, SLOT_OFFSETS, Begun, begun_path, decode_slot, encode_file, encode_slot
from engine.directory_storage import sync_directory
from engine.environment import make_file
from engine.errors import StoreMoved
from engine.failpoints import reached

log = logging.getLogger("shoal.writer")

_SYNC_SECONDS = 1.0


class BegunFile:
    """The record of one store, for its one writer.

    Args:
        check_in_place: a method that raises StoreMoved where other files have come to lie at the store's path: the
            record beside them is not this store's to write.
    """

    def __init__(self, store: Path, check_in_place: Callable[[], None]) -> None:
        self._path = begun_path(store)
        # Weak, as who has the method has this object: an environment that is let go closes at once.
        self._check_in_place = weakref.WeakMethod(check_in_place)
        self._begun: Begun | None = None
        self._descriptor: int | None = None
        self._next_slot = 0
        self._is_dirty = False
        self._has_failed = False
        self._noting = threading.Lock()
        self._syncing = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=_keep_synced, args=(weakref.ref(self), self._stop), name="begun", daemon=True
        )

    def start(self, begun: Begun | None) -> None:
        """Note how far the store is, durably, if that is known yet, and keep the record synced from now on."""
        if begun is not None:
            self.note(begun)
        self.sync()
        self._thread.start()

    def note(self, begun: Begun) -> None:
        """Note a commit that is on the disk; the caller calls it for one commit after the other."""
        with self._noting:
            self._begun = begun
            if self._descriptor is None:
                return  # `sync` makes the file.
            try:
                os.pwrite(self._descriptor, encode_slot(begun), SLOT_OFFSETS[self._next_slot])
            except OSError as error:
                self._tell(error)
            else:
                self._next_slot = 1 - self._next_slot
                self._is_dirty = True

    def sync(self) -> None:
        """Have on the disk what was noted. Commits do not wait for it."""
        with self._syncing:
            try:
                if self._descriptor is None or not self._has_name(self._descriptor):
                    if (check_in_place := self._check_in_place()) is not None:
                        check_in_place()
                    self._open()
                if self._is_dirty and self._descriptor is not None:
                    self._is_dirty = False
                    os.fdatasync(self._descriptor)
            except StoreMoved:
                pass  # Each commit says so.
            except OSError as error:
                self._tell(error)
            else:
                self._has_failed = False

    def close(self) -> None:
        """Sync it for the last time."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self.sync()
        self._close()

    def __del__(self) -> None:
        self._stop.set()
        self._close()

    def _open(self) -> None:
        """Open the file, which is made if there is none, or none that can be read."""
        begun = self._begun
        if begun is None:
            return
        slots = self._read_slots()
        if all(slot is None or slot.store_id != begun.store_id for slot in slots):
            self._make(begun)
            slots = [begun, begun]
        descriptor = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        with self._noting:
            self._close()
            commits = [slot.commit if slot is not None else -1 for slot in slots]
            self._descriptor, self._next_slot = descriptor, commits.index(min(commits))
        self.note(self._begun or begun)  # What was noted meanwhile.

    def _read_slots(self) -> list[Begun | None]:
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return []
        # A file without its blocks would need room on the disk at some commit.
        return [decode_slot(content, offset) for offset in SLOT_OFFSETS] if len(content) >= FILE_BYTES else []

    def _make(self, begun: Begun) -> None:
        aside = self._path.with_name(f".{self._path.name}")
        try:
            make_file(aside)
            with aside.open("r+b") as file:
                file.write(encode_file(begun))
                file.flush()
                os.fsync(file.fileno())
            reached("begun.aside")
            aside.rename(self._path)
        except OSError:
            aside.unlink(missing_ok=True)
            raise
        sync_directory(self._path.parent)

    def _has_name(self, descriptor: int) -> bool:
        """Whether the file that is open is the one at the path, where others look for it."""
        own = os.fstat(descriptor)
        try:
            return os.path.samestat(own, self._path.stat())
        except FileNotFoundError:
            return False

    def _close(self) -> None:
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None

    def _tell(self, error: OSError) -> None:
        if not self._has_failed:
            log.error("%s cannot be written (%s): a loss of commits may go unnoticed until it can", self._path, error)
        self._has_failed = True


def _keep_synced(reference: "weakref.ref[BegunFile]", stop: threading.Event) -> None:
    while not stop.wait(_SYNC_SECONDS):
        file = reference()
        if file is None:
            return
        file.sync()
        del file
