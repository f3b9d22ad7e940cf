"""Check the B-trees in the file of an LMDB environment, before LMDB reads them.

LMDB believes its pages: one that a disk or a hand changed ends the process by SIGSEGV, or has entries vanish without a
word. Here every page that a tree refers to is held against what else is known of it: its own number and kind, the
bounds of its nodes, the order of its keys, and the tree's counts of pages and entries. Values are not looked at, other
than that all their pages are there.

The caller holds a read transaction, so that no page of its commit is written meanwhile.
"""

import os
import struct
from collections.abc import Collection, Iterator
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from engine.errors import START_ANEW, StoreDamaged
from engine.lmdb_file import (
    DATABASE,
    HEADER,
    IS_BRANCH,
    IS_DATABASE,
    IS_LEAF,
    IS_VALUE,
    NO_PAGE,
    NODE,
    NUMBER,
    PAGE_HEAD,
    VALUE_APART,
    Meta,
    metas,
)

_MAIN_FLAGS, _FREE_FLAGS = 0, 8
"""Of the free pages' tree the keys are integers."""
_FIRST_PAGE = 2
"""The pages before it are the commits' own."""
_MOST_DEPTH = 32
"""As deep as a cursor of LMDB goes."""


class Tree(NamedTuple):
    """What is noted of a tree: MDB_db in LMDB's source."""

    padding: int
    flags: int
    depth: int
    branches: int
    leaves: int
    values: int
    entries: int
    root: int


class _Node(NamedTuple):
    """A node of a leaf: `value` is its value, or its first page's number where the value lies apart."""

    key: bytes
    flags: int
    value: bytes


class _Wrong(Exception):
    """What is wrong with a page."""


def check_trees(path: Path, commit: int, names: Collection[bytes], *, with_free_pages: bool) -> set[bytes]:
    """Check the main tree of an environment's file, the named ones in it, and for who writes the free pages', too.

    Args:
        commit: the commit to check, which the caller has a read transaction on.
        names: the trees that this process reads.

    Returns:
        The names of all trees that there are.

    Raises:
        StoreDamaged: a page cannot be what LMDB wrote.
        LookupError: a later commit has taken the place of this one; begin another transaction.
    """
    with path.open("rb", buffering=0) as file:
        try:
            meta = next(meta for meta in metas(file) if meta.commit == commit)
        except StopIteration:
            raise LookupError(commit) from None
        try:
            return _Check(file, meta).run(names, with_free_pages=with_free_pages)
        except (_Wrong, struct.error, IndexError) as error:
            raise StoreDamaged(f"{path} is damaged at commit {commit}: {error}; {START_ANEW}") from error


class _Check:
    """The check of one commit: `taken` has a byte a page, 1 for those that a tree or the list of free pages has."""

    def __init__(self, file: FileIO, meta: Meta) -> None:
        self._file = file
        self._page_size = meta.page_size
        self._last_page = meta.last_page
        self._main, self._free = Tree(*DATABASE.unpack(meta.main)), Tree(*DATABASE.unpack(meta.free))
        in_file = -(-os.fstat(file.fileno()).st_size // meta.page_size)
        self._taken = np.zeros(min(in_file, meta.last_page + 1), np.uint8)

    def run(self, names: Collection[bytes], *, with_free_pages: bool) -> set[bytes]:
        trees = {}
        if (self._main.flags, self._free.flags) != (_MAIN_FLAGS, _FREE_FLAGS):
            raise _Wrong(f"its trees have the flags {self._main.flags} and {self._free.flags}")
        for node in self._nodes("main", self._main):
            if node.flags == IS_DATABASE:
                trees[node.key] = Tree(*DATABASE.unpack(node.value))
        for name in names:
            if name in trees:
                self._check_values(name.decode(), trees[name])
        if with_free_pages:
            for name in trees.keys() - set(names):
                self._check_values(name.decode(errors="replace"), trees[name])
            self._check_free()
        return set(trees)

    def _check_values(self, name: str, tree: Tree) -> None:
        if tree.flags != _MAIN_FLAGS:
            raise _Wrong(f"the tree {name} has the flags {tree.flags}")
        for node in self._nodes(name, tree):
            if node.flags not in (0, VALUE_APART):
                raise _Wrong(f"the tree {name} has a node with the flags {node.flags}")

    def _check_free(self) -> None:
        """Check that no page is both free and in use: LMDB would write over it."""
        for node in self._nodes("free pages", self._free, integers=True):
            value = node.value if node.flags != VALUE_APART else self._value_apart(node)
            count = NUMBER.unpack_from(value)[0]
            if NUMBER.size * (count + 1) > len(value):
                raise _Wrong(f"a list of {count} free pages has {len(value)} bytes")
            free = np.frombuffer(value, np.uint64, count, NUMBER.size)
            if count and (free.min() < _FIRST_PAGE or free.max() > self._last_page or np.unique(free).size < count):
                raise _Wrong("a list of free pages has pages that there are not, or has one twice")
            self._take_all(free[free < self._taken.size])

    def _take_all(self, pages: npt.NDArray[np.uint64]) -> None:
        if self._taken[pages].any():
            raise _Wrong(f"page {pages[self._taken[pages] > 0][0]} is both free and in use")
        self._taken[pages] = 1

    def _take(self, first: int, count: int = 1) -> None:
        if first < _FIRST_PAGE or first + count > self._taken.size:
            raise _Wrong(f"page {first} is referred to, and is not there")
        if self._taken[first : first + count].any():
            raise _Wrong(f"page {first} is referred to twice")
        self._taken[first : first + count] = 1

    # --- trees -----------------------------------------------------------------------------------------------------

    def _nodes(self, name: str, tree: Tree, *, integers: bool = False) -> Iterator[_Node]:
        """All nodes of a tree's leaves, in order; the counts of the tree are checked at the end."""
        walk = _Walk(self, name, integers=integers)
        if (tree.root == NO_PAGE) != (tree.depth == 0) or tree.depth > _MOST_DEPTH:
            raise _Wrong(f"the tree {name} has depth {tree.depth} and the root {tree.root}")
        if tree.root != NO_PAGE:
            yield from walk.below(tree.root, tree.depth)
        found = (walk.branches, walk.leaves, walk.values, walk.entries)
        if found != (tree.branches, tree.leaves, tree.values, tree.entries):
            raise _Wrong(
                f"the tree {name} has {found[3]} entries, and {found[:3]} pages of branches, leaves and values, where "
                f"{tree.entries} and {(tree.branches, tree.leaves, tree.values)} are noted"
            )

    def page(self, number: int, kind: int) -> bytes:
        """A page of a tree whose head and list of nodes were checked."""
        self._take(number)
        page = os.pread(self._file.fileno(), self._page_size, number * self._page_size)
        own, _, flags, end, first = PAGE_HEAD.unpack_from(page)
        if (own, flags) != (number, kind):
            raise _Wrong(f"page {number} says that it is page {own}, of kind {flags}; it was to be of kind {kind}")
        if not HEADER + 2 <= end <= first <= len(page) == self._page_size or end % 2:
            raise _Wrong(f"the nodes of page {number} end at {end} and begin at {first}")
        return page

    def value_pages(self, first: int, size: int) -> int:
        """The number of pages of a value that lies apart."""
        own, _, flags, low, high = PAGE_HEAD.unpack(os.pread(self._file.fileno(), HEADER, first * self._page_size))
        count: int = low | high << 16
        if (own, flags) != (first, IS_VALUE) or count * self._page_size < HEADER + size:
            raise _Wrong(f"page {first} says that it is page {own}, of kind {flags}, the first of {count}")
        self._take(first, count)
        return count

    def _value_apart(self, node: _Node) -> bytes:
        first, size = NUMBER.unpack_from(node.value)[0], NUMBER.unpack_from(node.value, NUMBER.size)[0]
        return os.pread(self._file.fileno(), size, first * self._page_size + HEADER)


class _Walk:
    """One pass through a tree, which counts what it finds."""

    def __init__(self, check: _Check, name: str, *, integers: bool) -> None:
        self._check = check
        self._name = name
        self._integers = integers
        self._last: bytes | int | None = None
        self._least: bytes | int | None = None
        self.branches = self.leaves = self.values = self.entries = 0

    def below(self, number: int, depth: int) -> Iterator[_Node]:
        """All nodes of the leaves below a page, which is so deep."""
        if depth == 1:
            yield from self._leaf(number)
            return
        self.branches += 1
        page = self._check.page(number, IS_BRANCH)
        for place, (start, low, high, flags, key_size) in enumerate(_headers(page, number)):
            if place:
                # A search goes by this key: keys before it are less, keys below it are not.
                separator = self._key(page, start, key_size)
                if self._last is None or not self._last < separator:  # type: ignore[operator]
                    raise _Wrong(f"the keys of page {number} of the tree {self._name} are not in order")
                self._least = separator
            yield from self.below(low | high << 16 | flags << 32, depth - 1)

    def _leaf(self, number: int) -> Iterator[_Node]:
        self.leaves += 1
        page = self._check.page(number, IS_LEAF)
        headers = list(_headers(page, number))
        keys = [self._key(page, start, key_size) for start, _, _, _, key_size in headers]
        if (
            any(not one < other for one, other in pairwise(keys))  # type: ignore[operator]
            or (self._last is not None and not self._last < keys[0])  # type: ignore[operator]
            or (self._least is not None and keys[0] < self._least)  # type: ignore[operator]
        ):
            raise _Wrong(f"the keys of page {number} of the tree {self._name} are not in order")
        self._last, self._least = keys[-1], None
        self.entries += len(keys)
        for start, low, high, flags, key_size in headers:
            at, size = start + NODE.size + key_size, low | high << 16
            value = page[at : at + (NUMBER.size if flags & VALUE_APART else size)]
            if flags & VALUE_APART:
                self.values += self._check.value_pages(NUMBER.unpack(value)[0], size)
                value += NUMBER.pack(size)
            elif len(value) < size:
                raise _Wrong(f"a value of page {number} goes beyond its end")
            yield _Node(page[start + NODE.size : at], flags, value)

    def _key(self, page: bytes, start: int, size: int) -> bytes | int:
        key = page[start + NODE.size : start + NODE.size + size]
        if len(key) < size or (self._integers and size != NUMBER.size):
            raise _Wrong(f"a key of the tree {self._name} has {size} bytes")
        return NUMBER.unpack(key)[0] if self._integers else key


def _headers(page: bytes, number: int) -> list[tuple[int, int, int, int, int]]:
    """Where each node of a page starts, and its head."""
    _, _, _, end, first = PAGE_HEAD.unpack_from(page)
    starts = [start for (start,) in struct.iter_unpack("<H", page[HEADER:end])]
    if min(starts) != first or any(start % 2 for start in starts):
        raise _Wrong(f"the nodes of page {number} begin at {min(starts)}, and are noted to begin at {first}")
    return [(start, *NODE.unpack_from(page, start)) for start in starts]
