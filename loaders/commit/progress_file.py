"""Write the record of a store's progress: see `shoal.engine.format.progress`.

Each commit makes one write into the file, whose blocks are already allocated. The commit does not wait for the disk: a
thread syncs the file every second. If the file cannot be written, commits still succeed. The record then lags behind.
If commits that it does not contain are lost, nobody notices.
"""

import contextlib
import logging
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

from shoal.engine.base.errors import StoreMoved
from shoal.engine.base.failpoints import reached
from shoal.engine.base.system import sync_data
from shoal.engine.format.progress import (
    FILE_BYTES,
    SLOT_OFFSETS,
    Begun,
    begun_path,
    decode_slot,
    encode_file,
    encode_slot,
)
from shoal.engine.root.directory_storage import sync_directory
from shoal.engine.store.disk import make_file

log = logging.getLogger("shoal.writer")

_SYNC_SECONDS = 1.0


class BegunFile:
    """The record of one store's progress, for the only writer of the store.

    Args:
        check_in_place: a method that raises StoreMoved if other files are at the store's path. The record next to those
            files belongs to another store and must not be overwritten.
    """

    def __init__(self, store: Path, check_in_place: Callable[[], None]) -> None:
        self._path = begun_path(store)
        # Keep only a weak reference, because the owner of the method refers to this object. A strong reference would
        # make a reference cycle, and the environment would not close as soon as nothing uses it.
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
        """Note the store's progress on the disk, if it is known yet, and keep the record synced from now on."""
        if begun is not None:
            self.note(begun)
        self.sync()
        self._thread.start()

    def note(self, begun: Begun) -> None:
        """Note a commit that is on the disk. The caller must note commits in their order, one at a time."""
        with self._noting:
            self._begun = begun
            if self._descriptor is None:
                return  # `sync` creates the file.
            try:
                os.pwrite(self._descriptor, encode_slot(begun), SLOT_OFFSETS[self._next_slot])
            except OSError as error:
                self._tell(error)
            else:
                self._next_slot = 1 - self._next_slot
                self._is_dirty = True

    def sync(self) -> None:
        """Sync the noted progress to the disk. Commits do not wait for this."""
        with self._syncing:
            try:
                if self._descriptor is None or not self._has_name(self._descriptor):
                    if (check_in_place := self._check_in_place()) is not None:
                        check_in_place()
                    self._open()
                if self._is_dirty and self._descriptor is not None:
                    self._is_dirty = False
                    sync_data(self._descriptor)
            except StoreMoved:
                pass  # Each commit raises this error.
            except OSError as error:
                self._tell(error)
            else:
                self._has_failed = False

    def close(self) -> None:
        """Stop the thread, and sync the record for the last time."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self.sync()
        self._close()

    def __del__(self) -> None:
        self._stop.set()
        self._close()

    def _open(self) -> None:
        """Open the file; create it first if it is missing or contains no readable record of this store."""
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
            self._descriptor = descriptor
            self._next_slot = commits.index(min(commits))
        self.note(self._begun or begun)  # A commit may have been noted meanwhile.

    def _read_slots(self) -> list[Begun | None]:
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return []
        # Treat a file that is too short as missing, so that `_open` creates a file of full size. A write into the short
        # file would have to extend it, and would fail if the disk is full.
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
        """Return whether the open file is still the file at the record's path, where other processes look for the
        record."""
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
