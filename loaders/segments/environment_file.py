"""Write an LMDB environment once, from front to back: first the large values as they arrive, then the tree over them.

The result is an ordinary LMDB environment. Shoal writes the file itself because this is faster. LMDB copies each value
into fresh memory before it writes the value, so a load with LMDB's own transactions takes nearly twice as long.
"""

import os
import struct
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from itertools import accumulate, count
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shoal.engine.base.system import reserve, sync_data
from shoal.engine.store.disk import make_file
from shoal.engine.store.lmdb_file import (
    DATA_VERSION,
    DATABASE,
    HEADER,
    IS_BRANCH,
    IS_LEAF,
    IS_META,
    IS_VALUE,
    MAGIC,
    META,
    NO_PAGE,
    NODE,
    NUMBER,
    PAGE_HEAD,
    VALUE_APART,
)

_VALUE_PAGE = struct.Struct("<QHHI")  # Number, padding, flags, how many pages the value takes.
PAGE = 4096
_PART_BYTES = 32 << 20
_META_PAGES = 2
FIRST_VALUE = PAGE * _META_PAGES + HEADER
"""The offset of the first value in the file, in bytes."""
MAX_VALUE_BYTES = (1 << 32) - 1

_INTEGER_KEYS = 8

_Node = tuple[bytes, bytes]
"""A key and its encoded node."""


@dataclass(frozen=True)
class StoredValue:
    """The place of a key's value in the file: its offset and size in bytes."""

    key: bytes
    offset: int
    size: int


class EnvironmentFile:
    """The file of an environment that is being built.

    Args:
        values: the values that the file already contains, in the order of their keys. The rest of the file is cut off.
    """

    def __init__(self, path: Path, values: Sequence[StoredValue] = ()) -> None:
        self._path = path
        self._values = list(values)
        self._next = next_value(values[-1].offset, values[-1].size) if values else FIRST_VALUE
        make_file(path)
        with path.open("r+b", buffering=0) as file:
            file.truncate(self._next - HEADER)
            os.fsync(file.fileno())

    def append(self, key: bytes, value: npt.NDArray[np.uint8]) -> int:
        """Write a value of at most MAX_VALUE_BYTES behind all other values, and return its offset in the file.

        When this returns, the value is on the disk. If this raises OSError, for example because the disk is full, no
        part of the value is left in the file.
        """
        offset = self._next
        following = next_value(self._next, value.size)
        start = offset - HEADER
        size = following - offset
        head = _VALUE_PAGE.pack(start // PAGE, 0, IS_VALUE, size // PAGE)
        try:
            with self._path.open("r+b", buffering=0) as file:
                # Allocate all the space at once: the file system then finds the space faster, and keeps it contiguous.
                reserve(file.fileno(), start, size)
                _write(file, head, start)
                _write_through(file, value.data, offset)
        except OSError:
            os.truncate(self._path, start)
            raise
        self._values.append(StoredValue(key, offset, value.size))
        self._next = following
        return offset

    def finish(self) -> None:
        """Write the tree over all values. When this returns, LMDB can open the file, and the whole file is on the
        disk."""
        first = number = self._next // PAGE
        levels = [_pages(map(_leaf, self._values), IS_LEAF, number)]
        while len(levels[-1]) > 1:
            children = map(_branch, levels[-1], count(number))
            number += len(levels[-1])
            levels.append(_pages(children, IS_BRANCH, number))
        pages = [page for level in levels for _, page in level]
        last = first + len(pages) - 1
        leaves = len(levels[0])
        main = DATABASE.pack(
            0,
            0,
            len(levels) if leaves else 0,
            len(pages) - leaves,
            leaves,
            first - _META_PAGES,
            len(self._values),
            last if leaves else NO_PAGE,
        )
        with self._path.open("r+b", buffering=0) as file:
            _write(file, b"".join(pages), PAGE * first)
            _write(file, b"".join(_meta_page(commit, main, last) for commit in range(_META_PAGES)), 0)
            os.fsync(file.fileno())


def next_value(offset: int, size: int) -> int:
    """Return the offset of the value that follows a value of `size` bytes at `offset`."""
    return -(-(offset + size) // PAGE) * PAGE + HEADER


def _leaf(value: StoredValue) -> _Node:
    head = NODE.pack(value.size & 0xFFFF, value.size >> 16, VALUE_APART, len(value.key))
    return value.key, head + value.key + NUMBER.pack(value.offset // PAGE)


def _branch(page: _Node, number: int) -> _Node:
    key, _ = page
    return key, NODE.pack(number & 0xFFFF, number >> 16 & 0xFFFF, number >> 32, len(key)) + key


def _pages(nodes: Iterable[_Node], flags: int, number: int) -> list[_Node]:
    """Pack nodes into pages, and return each page with the key of its first node. The page numbers begin at
    `number`."""
    gathered: list[tuple[bytes, list[bytes]]] = []
    room = 0
    for key, node in nodes:
        even = node + bytes(len(node) % 2)
        if room < 2 + len(even):
            gathered.append((key, []))
            room = PAGE - HEADER
        gathered[-1][1].append(even)
        room -= 2 + len(even)
    return [(key, _page(number + index, flags, inside)) for index, (key, inside) in enumerate(gathered)]


def _page(number: int, flags: int, nodes: Sequence[bytes]) -> bytes:
    """Return a page: its header, the offset of each node, a gap, and the nodes."""
    *starts, _ = accumulate(map(len, nodes), initial=PAGE - sum(map(len, nodes)))
    head = PAGE_HEAD.pack(number, 0, flags, HEADER + 2 * len(nodes), starts[0])
    return (head + struct.pack(f"<{len(nodes)}H", *starts)).ljust(starts[0], b"\0") + b"".join(nodes)


def _meta_page(commit: int, main: bytes, last: int) -> bytes:
    """Return the meta page of a commit; its page number is the number of the commit.

    There are no free pages, because nothing was ever rewritten.
    """
    free = DATABASE.pack(PAGE, _INTEGER_KEYS, 0, 0, 0, 0, 0, NO_PAGE)
    meta = META.pack(MAGIC, DATA_VERSION, 0, PAGE * (last + 1), free, main, last, commit)
    return (PAGE_HEAD.pack(commit, 0, IS_META, 0, 0) + meta).ljust(PAGE, b"\0")


def _write_through(file: FileIO, data: memoryview, at: int) -> None:
    """Write data to the disk in parts: the disk stores one part while the operating system accepts the next part."""
    with ThreadPoolExecutor(1) as pool:
        syncs = []
        for start in range(0, len(data), _PART_BYTES):
            _write(file, data[start : start + _PART_BYTES], at + start)
            syncs.append(pool.submit(sync_data, file.fileno()))
        for sync in syncs:
            sync.result()


def _write(file: FileIO, data: "bytes | memoryview", at: int) -> None:
    rest = memoryview(data)
    while rest:
        written = os.pwrite(file.fileno(), rest, at)
        rest = rest[written:]
        at = at + written
