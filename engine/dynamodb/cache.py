"""A small cache of rows from tables, shared by all processes of a node: an LMDB environment of its own.

    <store>/remote-cache/<boot>/     <boot> is the running kernel's

Nothing in it is worth a sync: a process that dies leaves what it committed in the system's pages, and after a failure
of power the directory of another boot is not opened, but removed. An entry says until when it holds; a cache that is
full starts over.
"""

import shutil
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar
from weakref import WeakValueDictionary

import lmdb

from engine.environment import LOCK, make_directory
from engine.reader_slots import claim_process_id

_DIRECTORY = "remote-cache"
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_EXPIRY = struct.Struct("<q")
_MAX_READERS = 2048
NO_ROW = b""
"""What stands for a key that has no row."""


class RowCache:
    """One store's cache in this process. `open` gives the one there is."""

    _opened: ClassVar["WeakValueDictionary[Path, RowCache]"] = WeakValueDictionary()
    _opening = threading.Lock()

    def __init__(self, path: Path, size: int) -> None:
        make_directory(path)
        for other in path.parent.iterdir():
            if other.name != path.name:
                shutil.rmtree(other, ignore_errors=True)
        claim_process_id(path / LOCK)
        self._env = lmdb.open(
            str(path), map_size=size, max_readers=_MAX_READERS, sync=False, metasync=False, readahead=False, mode=0o640
        )
        self._env.reader_check()
        with self._env.begin():
            pass  # From here on LMDB knows that a process with this id is alive.

    @classmethod
    def open(cls, store: Path, size: int) -> "RowCache":
        """The cache of a store, of at most so many bytes.

        Raises:
            lmdb.Error, OSError: it cannot be opened.
            ProcessIdTaken: a process of another PID namespace has it open under this process's id.
        """
        path = store.resolve() / _DIRECTORY / _BOOT.read_text().strip()
        with cls._opening:
            cache = cls._opened.get(path)
            if cache is None:
                cache = cls._opened[path] = cls(path, size)
            return cache

    def get(self, prefix: bytes, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """The values of those keys that are in the cache and hold still; NO_ROW where there is known to be no row."""
        now, found = time.time_ns(), {}
        with self._env.begin() as transaction, transaction.cursor() as cursor:
            cut = len(prefix)
            for key, value in cursor.getmulti([prefix + key for key in keys]):
                if _EXPIRY.unpack_from(value)[0] > now:
                    found[key[cut:]] = value[_EXPIRY.size :]
        return found

    def put(self, prefix: bytes, rows: Mapping[bytes, bytes], seconds: float) -> None:
        """Keep values for so many seconds from now."""
        until = _EXPIRY.pack(time.time_ns() + int(seconds * 1e9))
        items = [(prefix + key, until + value) for key, value in rows.items()]
        try:
            self._write(items)
        except lmdb.MapFullError:
            with self._env.begin(write=True) as transaction:
                transaction.drop(self._env.open_db(None, txn=transaction), delete=False)
            self._write(items)

    def _write(self, items: Sequence[tuple[bytes, bytes]]) -> None:
        with self._env.begin(write=True) as transaction, transaction.cursor() as cursor:
            cursor.putmulti(items)
