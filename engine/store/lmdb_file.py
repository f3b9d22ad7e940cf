"""Read and write parts of an LMDB environment's file without LMDB.

Source: the structs MDB_page, MDB_node, MDB_db and MDB_meta in mdb.c of LMDB 0.9, whose data version is 1.
"""

import os
import struct
import time
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from shoal.engine.base.errors import START_ANEW, StoreDamaged

HEADER = 16
"""The size in bytes of the header at the start of a page. If a value takes several pages, only the first of them has a
header."""
MAGIC, DATA_VERSION = 0xBEEFC0DE, 1
IS_BRANCH, IS_LEAF, IS_VALUE, IS_META = 1, 2, 4, 8
VALUE_APART, IS_DATABASE = 1, 2
NO_PAGE = (1 << 64) - 1

PAGE_HEAD = struct.Struct("<QHHHH")  # Number, padding, flags, end of the list of nodes, start of the first node.
NODE = struct.Struct("<HHHH")  # Value size (low, high), flags, key size. In a branch: a 48-bit page number, key size.
NUMBER = struct.Struct("<Q")
# Fields: padding, flags, depth; numbers of branch, leaf and value pages; number of entries; page number of the root.
DATABASE = struct.Struct("<IHHQQQQQ")
META = struct.Struct("<IIQQ48s48sQQ")  # Magic, version, fixed address, map size, free pages, main, last page, commit.

_GIVEN_BACK = 1 << 20
"""The maximum number of pages between the end of the file and the last page ever taken. The last page ever taken may be
beyond the end of the file if a commit took pages and gave them back."""
_TRIES = 20
_RETRY_SECONDS = 0.001
_PAGE_SIZES = (1 << 12, 1 << 13, 1 << 14, 1 << 15, 1 << 16)


class Meta(NamedTuple):
    """The meta page of one of the two newest commits: the commit's id, the size of a page in bytes, the tree of free
    pages and the main tree (see `DATABASE`), and the last page ever taken."""

    commit: int
    page_size: int
    free: bytes
    main: bytes
    last_page: int

    @property
    def roots(self) -> tuple[int, int]:
        """The numbers of the two trees' root pages."""
        return DATABASE.unpack(self.free)[-1], DATABASE.unpack(self.main)[-1]


def check_length(path: Path) -> None:
    """Check that a file has all pages of its newest commit, before LMDB maps the file.

    SIGBUS kills a process that touches a mapped page beyond the end of the file.

    Raises:
        StoreDamaged: the file was cut short.
    """
    with path.open("rb", buffering=0) as file:
        while True:
            meta = _newest_meta(file)
            size = os.fstat(file.fileno()).st_size
            if meta is None or size >= (meta.last_page + 1) * meta.page_size:
                return  # If the file is not an environment at all, LMDB rejects it.
            # A page that a commit took and gave back is never written. Such a page may be missing at the end of the
            # file.
            if _is_complete(file, meta, size):
                return
            if _newest_meta(file) == meta:  # If not, a new commit came during the check, and the loop checks it.
                raise StoreDamaged(
                    f"{path} has {size} bytes, but its last commit uses {(meta.last_page + 1) * meta.page_size}: it "
                    f"was cut short; {START_ANEW}"
                )


def check_metas(path: Path) -> None:
    """Check the two meta pages, which name the last commits. LMDB takes the page size from the meta pages, and computes
    all addresses from the page size.

    Raises:
        StoreDamaged: a page is not an LMDB meta page, or names a last page far beyond the end of the file.
    """
    with path.open("rb", buffering=0) as file:
        for _ in range(_TRIES):
            size = os.fstat(file.fileno()).st_size
            found = metas(file)
            last = max((meta.last_page - size // meta.page_size for meta in found), default=0)
            if size == 0 or (len(found) == 2 and last <= _GIVEN_BACK):
                return
            time.sleep(_RETRY_SECONDS)  # A commit may be in progress.
    raise StoreDamaged(f"{path} is damaged: its first two pages are not LMDB meta pages; {START_ANEW}")


def metas(file: FileIO) -> list[Meta]:
    """Read the meta pages of the newest commit and of the commit before it, in no particular order. The list is shorter
    if a meta page is damaged."""
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
    """Set the id of a compacted copy's only commit to `commit`, or to `commit + 1` if `commit` is even. LMDB gave the
    commit the id 1 and wrote it to the second meta page, which is the page for odd ids."""
    first = _meta(file, 0)
    second = _meta(file, first.page_size) if first is not None else None
    if second is None or second.commit != 1:
        raise ValueError("the file is not a compacted copy")
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
        return False  # The existing pages are damaged too.


def _is_there(file: FileIO, page_size: int, size: int, number: int) -> bool:
    """Return whether the file has a page and all pages below it."""
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
