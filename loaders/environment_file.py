"""Write an LMDB environment once, from front to back: large values as they come, and at the end the tree over them.

What comes out is an environment like any other. But LMDB copies each value into fresh memory before it writes it: with
its own transactions a load takes nearly twice as long.
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

from engine.environment import make_file
from engine.lmdb_file import (
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
"""Where in the file the first value begins."""
MAX_VALUE_BYTES = (1 << 32) - 1

_INTEGER_KEYS = 8

_Node = tuple[bytes, bytes]
"""A key, and the node for it."""


@dataclass(frozen=True)
class StoredValue:
    """Where in the file the value of a key lies."""

    key: bytes
    offset: int
    size: int


class EnvironmentFile:
    """The file of an environment in the making. It holds some values, in the order of their keys, already; what lies
    behind them is cut off."""

    def __init__(self, path: Path, values: Sequence[StoredValue] = ()) -> None:
        self._path = path
        self._values = list(values)
        self._next = next_value(values[-1].offset, values[-1].size) if values else FIRST_VALUE
        make_file(path)
        with path.open("r+b", buffering=0) as file:
            file.truncate(self._next - HEADER)
            os.fsync(file.fileno())

    def append(self, key: bytes, value: npt.NDArray[np.uint8]) -> int:
        """Write a value of at most MAX_VALUE_BYTES under a key behind all others. When this returns it is on the disk,
        at the offset returned; if it raises OSError, as it does where there is no room, nothing of it is left."""
        offset, following = self._next, next_value(self._next, value.size)
        start, size = offset - HEADER, following - offset
        head = _VALUE_PAGE.pack(start // PAGE, 0, IS_VALUE, size // PAGE)
        try:
            with self._path.open("r+b", buffering=0) as file:
                # Room that is asked for as a whole is found faster, and lies together.
                os.posix_fallocate(file.fileno(), start, size)
                _write(file, head, start)
                _write_through(file, value.data, offset)
        except OSError:
            os.truncate(self._path, start)
            raise
        self._values.append(StoredValue(key, offset, value.size))
        self._next = following
        return offset

    def finish(self) -> None:
        """Write the tree over all values. When this returns LMDB can open the file, and all of it is on the disk."""
        first = number = self._next // PAGE
        levels = [_pages(map(_leaf, self._values), IS_LEAF, number)]
        while len(levels[-1]) > 1:
            children = map(_branch, levels[-1], count(number))
            number += len(levels[-1])
            levels.append(_pages(children, IS_BRANCH, number))
        pages = [page for level in levels for _, page in level]
        last, leaves = first + len(pages) - 1, len(levels[0])
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
    """Where the next value begins behind one."""
    return -(-(offset + size) // PAGE) * PAGE + HEADER


def _leaf(value: StoredValue) -> _Node:
    head = NODE.pack(value.size & 0xFFFF, value.size >> 16, VALUE_APART, len(value.key))
    return value.key, head + value.key + NUMBER.pack(value.offset // PAGE)


def _branch(page: _Node, number: int) -> _Node:
    key, _ = page
    return key, NODE.pack(number & 0xFFFF, number >> 16 & 0xFFFF, number >> 32, len(key)) + key


def _pages(nodes: Iterable[_Node], flags: int, number: int) -> list[_Node]:
    """Pages from a number on, full of nodes, each under its first node's key."""
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
    """A page: its head, where each node begins, a gap, the nodes."""
    *starts, _ = accumulate(map(len, nodes), initial=PAGE - sum(map(len, nodes)))
    head = PAGE_HEAD.pack(number, 0, flags, HEADER + 2 * len(nodes), starts[0])
    return (head + struct.pack(f"<{len(nodes)}H", *starts)).ljust(starts[0], b"\0") + b"".join(nodes)


def _meta_page(commit: int, main: bytes, last: int) -> bytes:
    """A meta page, which has the number of its commit. There are no free pages: nothing was ever rewritten."""
    free = DATABASE.pack(PAGE, _INTEGER_KEYS, 0, 0, 0, 0, 0, NO_PAGE)
    meta = META.pack(MAGIC, DATA_VERSION, 0, PAGE * (last + 1), free, main, last, commit)
    return (PAGE_HEAD.pack(commit, 0, IS_META, 0, 0) + meta).ljust(PAGE, b"\0")


def _write_through(file: FileIO, data: memoryview, at: int) -> None:
    """Write to the disk itself, which is busy with one part while the system takes the next one."""
    with ThreadPoolExecutor(1) as pool:
        syncs = []
        for start in range(0, len(data), _PART_BYTES):
            _write(file, data[start : start + _PART_BYTES], at + start)
            syncs.append(pool.submit(os.fdatasync, file.fileno()))
        for sync in syncs:
            sync.result()


def _write(file: FileIO, data: "bytes | memoryview", at: int) -> None:
    rest = memoryview(data)
    while rest:
        written = os.pwrite(file.fileno(), rest, at)
        rest, at = rest[written:], at + written
