"""The file of an LMDB environment, as far as Shoal reads or writes it without LMDB.

Source: the structs MDB_page, MDB_node, MDB_db and MDB_meta in mdb.c of LMDB 0.9, whose data version is 1.
"""

import os
import struct
import time
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from engine.errors import START_ANEW, StoreDamaged

HEADER = 16
"""The bytes between the start of a page, or of a value's first page, and what is in it."""
MAGIC, DATA_VERSION = 0xBEEFC0DE, 1
IS_BRANCH, IS_LEAF, IS_VALUE, IS_META = 1, 2, 4, 8
VALUE_APART, IS_DATABASE = 1, 2
NO_PAGE = (1 << 64) - 1

PAGE_HEAD = struct.Struct(
    "<QHHHH"
)  # Number, padding, flags, where the list of nodes ends, where the first of them begins.
NODE = struct.Struct("<HHHH")  # A value's size, low and high, flags, the key's size; in a branch 48 bits of a number.
NUMBER = struct.Struct("<Q")
DATABASE = struct.Struct("<IHHQQQQQ")  # Padding, flags, depth; pages of branches, leaves and values; entries; root.
META = struct.Struct("<IIQQ48s48sQQ")  # Magic, version, fixed address, map size, free pages, main, last page, commit.

_GIVEN_BACK = 1 << 20
"""The last page ever taken may lie behind the end of the file, where a commit gave pages back, but no further than so
many pages."""
_TRIES = 20
_RETRY_SECONDS = 0.001
_PAGE_SIZES = (1 << 12, 1 << 13, 1 << 14, 1 << 15, 1 << 16)


class Meta(NamedTuple):
    """What one of the two newest commits says: the size of a page, the trees of free pages and of everything else (see
    `DATABASE`), and the last page ever taken."""

    commit: int
    page_size: int
    free: bytes
    main: bytes
    last_page: int

    @property
    def roots(self) -> tuple[int, int]:
        """The first pages of the trees."""
        return DATABASE.unpack(self.free)[-1], DATABASE.unpack(self.main)[-1]


def check_length(path: Path) -> None:
    """Check that a file has all pages that its newest commit refers to, before LMDB maps it.

    A process that touches a page of a map that its file does not have is ended by SIGBUS.

    Raises:
        StoreDamaged: the file was cut short.
    """
    with path.open("rb", buffering=0) as file:
        while True:
            meta, size = _newest_meta(file), os.fstat(file.fileno()).st_size
            if meta is None or size >= (meta.last_page + 1) * meta.page_size:
                return  # What is no environment at all, LMDB refuses.
            # A page that a commit took and gave back is never written: at the end of a file it may rightly be missing.
            if _is_complete(file, meta, size):
                return
            if _newest_meta(file) == meta:  # Else a commit came while the trees of the one before were being read.
                raise StoreDamaged(
                    f"{path} has {size} bytes, its last commit uses {(meta.last_page + 1) * meta.page_size}: it was "
                    f"cut short; {START_ANEW}"
                )


def check_metas(path: Path) -> None:
    """Check the two pages in which commits are noted: LMDB takes the size of a page, and so all addresses, from them.

    Raises:
        StoreDamaged: LMDB did not write them.
    """
    with path.open("rb", buffering=0) as file:
        for _ in range(_TRIES):
            size = os.fstat(file.fileno()).st_size
            found = metas(file)
            last = max((meta.last_page - size // meta.page_size for meta in found), default=0)
            if size == 0 or (len(found) == 2 and last <= _GIVEN_BACK):
                return
            time.sleep(_RETRY_SECONDS)  # A commit may be on its way.
    raise StoreDamaged(f"{path} is damaged: its first two pages are not LMDB meta pages; {START_ANEW}")


def metas(file: FileIO) -> list[Meta]:
    """The newest commit and the one before, in no order; fewer, if they are damaged."""
    first = _meta(file, 0)
    if first is None:
        return []
    second = _meta(file, first.page_size)
    if second is None or second.page_size != first.page_size:
        return [first]
    for number in (0, 1):
        own, _, flags, _, _ = PAGE_HEAD.unpack(os.pread(file.fileno(), HEADER, number * first.page_size))
        if (own, flags) != (number, IS_META):
            return [first]
    return [first, second]


def number_copy(file: FileIO, commit: int) -> None:
    """Give the one commit of a compacted copy, which LMDB calls its first, an id of at least so much. LMDB keeps a
    commit of an odd id in the second page, where it is."""
    first = _meta(file, 0)
    second = _meta(file, first.page_size) if first is not None else None
    if second is None or second.commit != 1:
        raise ValueError("it is no compacted copy")
    at = second.page_size + HEADER
    *fields, _ = META.unpack(os.pread(file.fileno(), META.size, at))
    os.pwrite(file.fileno(), META.pack(*fields, commit | 1), at)


def _newest_meta(file: FileIO) -> Meta | None:
    first = _meta(file, 0)
    if first is None:
        return None
    second = _meta(file, first.page_size)
    return max(first, second) if second else first


def _meta(file: FileIO, at: int) -> Meta | None:
    data = os.pread(file.fileno(), META.size, at + HEADER)
    if len(data) < META.size:
        return None
    magic, version, _, _, free, main, last, commit = META.unpack(data)
    page_size = DATABASE.unpack(free)[0]
    if (magic, version) != (MAGIC, DATA_VERSION) or page_size not in _PAGE_SIZES:
        return None
    return Meta(commit, page_size, free, main, last)


def _is_complete(file: FileIO, meta: Meta, size: int) -> bool:
    try:
        return all(_is_there(file, meta.page_size, size, root) for root in meta.roots)
    except (struct.error, RecursionError):
        return False  # What is there makes no sense either.


def _is_there(file: FileIO, page_size: int, size: int, number: int) -> bool:
    """Whether the file has a page and all that it refers to."""
    if number == NO_PAGE:
        return True
    page = os.pread(file.fileno(), page_size, number * page_size)
    if len(page) < page_size:
        return False
    flags, end = PAGE_HEAD.unpack_from(page)[2:4]
    if not flags & (IS_BRANCH | IS_LEAF) or not HEADER <= end <= page_size:
        return False
    for (start,) in struct.iter_unpack("<H", page[HEADER : end - end % 2]):
        low, high, node_flags, key_size = NODE.unpack_from(page, start)
        value = start + NODE.size + key_size
        if flags & IS_BRANCH:
            if not _is_there(file, page_size, size, low | high << 16 | node_flags << 32):
                return False
        elif node_flags & IS_DATABASE:
            if not _is_there(file, page_size, size, DATABASE.unpack_from(page, value)[-1]):
                return False
        elif node_flags & VALUE_APART:
            (first,) = NUMBER.unpack_from(page, value)
            if first * page_size + HEADER + (low | high << 16) > size:
                return False
    return True
