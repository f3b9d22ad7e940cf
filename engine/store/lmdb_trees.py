"""Check the B-trees in the file of an LMDB environment, before LMDB reads them.

LMDB trusts its pages. A page that was changed by a disk fault or by hand kills the process with SIGSEGV, or makes
entries vanish without an error. This module checks every page of a tree: its own number and kind, the bounds of its
nodes, the order of its keys, and the tree's counts of pages and entries. It does not check the content of values, only
that all their pages exist.

The caller holds a read transaction, so that no page of its commit is overwritten during the check.
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

from shoal.engine.base.errors import START_ANEW, StoreDamaged
from shoal.engine.store.lmdb_file import (
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
"""The flags of the main tree and of the tree of free pages. In the tree of free pages, the keys are integers (flag
8)."""
_FIRST_PAGE = 2
"""The first page after the two meta pages."""
_MOST_DEPTH = 32
"""The maximum depth of a tree in levels; LMDB's cursors have the same limit."""


class Tree(NamedTuple):
    """The record of a tree: MDB_db in LMDB's source."""

    padding: int
    flags: int
    depth: int
    branches: int
    leaves: int
    values: int
    entries: int
    root: int


class _Node(NamedTuple):
    """A node of a leaf. `value` is the node's value. If the value is on pages of its own, `value` contains the number
    of the first page and the size of the value in bytes."""

    key: bytes
    flags: int
    value: bytes


class _Wrong(Exception):
    """A page is damaged; the message is the reason."""


def check_trees(path: Path, commit: int, names: Collection[bytes], *, with_free_pages: bool) -> set[bytes]:
    """Check the main tree of an environment's file and the named trees in it.

    Args:
        commit: the commit to check; the caller has a read transaction on it.
        names: the trees that this process reads.
        with_free_pages: also check all other trees and the list of free pages, which a writer uses.

    Returns:
        The names of all trees in the environment.

    Raises:
        StoreDamaged: a page is not as LMDB wrote it.
        LookupError: a later commit has overwritten the meta page of this commit; begin another transaction.
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
    """The check of one commit. `_taken` has one byte per page: 1 if a tree or the list of free pages has the page."""

    def __init__(self, file: FileIO, meta: Meta) -> None:
        self._file = file
        self._page_size = meta.page_size
        self._last_page = meta.last_page
        self._main = Tree(*DATABASE.unpack(meta.main))
        self._free = Tree(*DATABASE.unpack(meta.free))
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
        """Check that no page is both free and in use. LMDB would overwrite such a page."""
        for node in self._nodes("free pages", self._free, integers=True):
            value = node.value if node.flags != VALUE_APART else self._value_apart(node)
            count = NUMBER.unpack_from(value)[0]
            if NUMBER.size * (count + 1) > len(value):
                raise _Wrong(f"a list of {count} free pages has {len(value)} bytes")
            free = np.frombuffer(value, np.uint64, count, NUMBER.size)
            if count and (free.min() < _FIRST_PAGE or free.max() > self._last_page or np.unique(free).size < count):
                raise _Wrong("a list of free pages contains a page that does not exist, or contains a page twice")
            self._take_all(free[free < self._taken.size])

    def _take_all(self, pages: npt.NDArray[np.uint64]) -> None:
        if self._taken[pages].any():
            raise _Wrong(f"page {pages[self._taken[pages] > 0][0]} is both free and in use")
        self._taken[pages] = 1

    def _take(self, first: int, count: int = 1) -> None:
        if first < _FIRST_PAGE or first + count > self._taken.size:
            raise _Wrong(f"page {first} is referred to, but does not exist")
        if self._taken[first : first + count].any():
            raise _Wrong(f"page {first} is referred to twice")
        self._taken[first : first + count] = 1

    # --- trees -----------------------------------------------------------------------------------------------------

    def _nodes(self, name: str, tree: Tree, *, integers: bool = False) -> Iterator[_Node]:
        """Yield all nodes of a tree's leaves, in order, and then check the tree's counts."""
        walk = _Walk(self, name, integers=integers)
        if (tree.root == NO_PAGE) != (tree.depth == 0) or tree.depth > _MOST_DEPTH:
            raise _Wrong(f"the tree {name} has depth {tree.depth} and the root {tree.root}")
        if tree.root != NO_PAGE:
            yield from walk.below(tree.root, tree.depth)
        found = (walk.branches, walk.leaves, walk.values, walk.entries)
        if found != (tree.branches, tree.leaves, tree.values, tree.entries):
            raise _Wrong(
                f"the tree {name} has {found[3]} entries, and {found[:3]} pages of branches, leaves and values, but "
                f"its record says {tree.entries} and {(tree.branches, tree.leaves, tree.values)}"
            )

    def page(self, number: int, kind: int) -> bytes:
        """Read a page of a tree, and check its header and its list of nodes."""
        self._take(number)
        page = os.pread(self._file.fileno(), self._page_size, number * self._page_size)
        own, _, flags, end, first = PAGE_HEAD.unpack_from(page)
        if (own, flags) != (number, kind):
            raise _Wrong(f"page {number} says that it is page {own} of kind {flags}, expected kind {kind}")
        if not HEADER + 2 <= end <= first <= len(page) == self._page_size or end % 2:
            raise _Wrong(f"the list of nodes of page {number} ends at {end}, and the first node begins at {first}")
        return page

    def value_pages(self, first: int, size: int) -> int:
        """Check the first page of a value on pages of its own, and return the number of these pages."""
        own, _, flags, low, high = PAGE_HEAD.unpack(os.pread(self._file.fileno(), HEADER, first * self._page_size))
        count: int = low | high << 16
        if (own, flags) != (first, IS_VALUE) or count * self._page_size < HEADER + size:
            raise _Wrong(
                f"page {first} says that it is page {own} of kind {flags}, the first of {count} pages of a value; this "
                f"does not fit the value"
            )
        self._take(first, count)
        return count

    def _value_apart(self, node: _Node) -> bytes:
        first = NUMBER.unpack_from(node.value)[0]
        size = NUMBER.unpack_from(node.value, NUMBER.size)[0]
        return os.pread(self._file.fileno(), size, first * self._page_size + HEADER)


class _Walk:
    """One pass through a tree. It counts the tree's pages and entries."""

    def __init__(self, check: _Check, name: str, *, integers: bool) -> None:
        self._check = check
        self._name = name
        self._integers = integers
        self._last: bytes | int | None = None
        self._least: bytes | int | None = None
        self.branches = self.leaves = self.values = self.entries = 0

    def below(self, number: int, depth: int) -> Iterator[_Node]:
        """Yield all nodes of the leaves below a page. `depth` is the number of levels from the page to the leaves. If
        `depth` is 1, the page itself is a leaf."""
        if depth == 1:
            yield from self._leaf(number)
            return
        self.branches += 1
        page = self._check.page(number, IS_BRANCH)
        for place, (start, low, high, flags, key_size) in enumerate(_headers(page, number)):
            if place:
                # A search in the tree follows this key. So all earlier keys must be less than this key, and no key
                # below this node may be less.
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
        self._last = keys[-1]
        self._least = None
        self.entries += len(keys)
        for start, low, high, flags, key_size in headers:
            at = start + NODE.size + key_size
            size = low | high << 16
            value = page[at : at + (NUMBER.size if flags & VALUE_APART else size)]
            if flags & VALUE_APART:
                self.values += self._check.value_pages(NUMBER.unpack(value)[0], size)
                value += NUMBER.pack(size)
            elif len(value) < size:
                raise _Wrong(f"a value of page {number} extends beyond the end of the page")
            yield _Node(page[start + NODE.size : at], flags, value)

    def _key(self, page: bytes, start: int, size: int) -> bytes | int:
        key = page[start + NODE.size : start + NODE.size + size]
        if len(key) < size or (self._integers and size != NUMBER.size):
            raise _Wrong(f"a key of the tree {self._name} has {size} bytes")
        return NUMBER.unpack(key)[0] if self._integers else key


def _headers(page: bytes, number: int) -> list[tuple[int, int, int, int, int]]:
    """Return the start and the header of each node of a page."""
    _, _, _, end, first = PAGE_HEAD.unpack_from(page)
    starts = [start for (start,) in struct.iter_unpack("<H", page[HEADER:end])]
    if min(starts) != first or any(start % 2 for start in starts):
        raise _Wrong(f"the nodes of page {number} begin at {min(starts)}, but the page says {first}")
    return [(start, *NODE.unpack_from(page, start)) for start in starts]
