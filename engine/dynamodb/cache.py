"""A small cache of rows from tables, in its own LMDB environment, shared by all processes of a node.

    <store>/remote-cache/<boot>/     <boot> is the boot id of the running kernel

The cache is never synced to the disk. If a process dies, its commits are still in the page cache. After a power failure
the boot id is different, so the cache has another directory. Directories of other boots are removed without being
opened. Each entry has an expiry time. A full cache is emptied.
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

from shoal.engine.format.paths import LOCK
from shoal.engine.store.disk import make_directory
from shoal.engine.store.reader_slots import claim_process_id

_DIRECTORY = "remote-cache"
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_EXPIRY = struct.Struct("<q")
_MAX_READERS = 2048
NO_ROW = b""
"""The value of a key without a row."""


class RowCache:
    """The cache of one store in this process. `open` returns the existing instance if there is one."""

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
        """Return the cache of a store, of at most `size` bytes.

        Raises:
            lmdb.Error, OSError: the cache cannot be opened.
            ProcessIdTaken: a process of another PID namespace has the cache open under this process's id.
        """
        path = store.resolve() / _DIRECTORY / _BOOT.read_text().strip()
        with cls._opening:
            cache = cls._opened.get(path)
            if cache is None:
                cache = cls._opened[path] = cls(path, size)
            return cache

    def get(self, prefix: bytes, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """Return the unexpired cached values of keys. The value of a key that is known to have no row is NO_ROW."""
        now = time.time_ns()
        found = {}
        with self._env.begin() as transaction, transaction.cursor() as cursor:
            cut = len(prefix)
            for key, value in cursor.getmulti([prefix + key for key in keys]):
                if _EXPIRY.unpack_from(value)[0] > now:
                    found[key[cut:]] = value[_EXPIRY.size :]
        return found

    def put(self, prefix: bytes, rows: Mapping[bytes, bytes], seconds: float) -> None:
        """Keep values for the given number of seconds from now."""
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
