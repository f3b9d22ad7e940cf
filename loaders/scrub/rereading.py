"""Read a stored chunk again and verify its checksum: on the disk, and in memory if the page cache holds the chunk.

Workers serve from the page cache. If a bit flips in memory, they serve the wrong bit at once. If a bit flips on the
disk, they serve the wrong bit as soon as its page is evicted and read again. So each block is read from the disk itself
(O_DIRECT) and compared with its pages in the page cache. This neither caches nor evicts any page.

Some file systems do not support direct reads. On those, the block is read through the page cache, and pages that were
not cached before are evicted again. Damage on the disk under a cached page is then found only after that page is
evicted.

Files are read with system calls, not through a memory map: a failing disk then causes an error. With a map, the failing
disk would kill the process.
"""

import ctypes
import errno
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from shoal.engine.base.errors import StoreDamaged
from shoal.engine.format.catalog import SegmentRecord
from shoal.engine.format.layout import CHECKSUM_OFFSET, HEADER_SIZE, ChunkHeader
from shoal.engine.kernels.memory import address_of
from shoal.engine.store.lmdb_file import HEADER, PAGE_HEAD
from shoal.engine.store.segment import chunk_digest

BLOCK_BYTES = 2 << 20
PAGE = mmap.PAGESIZE
_DISK_FAILS = (errno.EIO, errno.EBADMSG, errno.EUCLEAN, errno.ENODATA, errno.EREMOTEIO)
"""The errno values of a disk or file system that cannot return the written bytes."""

_Bytes = npt.NDArray[np.uint8]
OverlayChunk = Callable[[], AbstractContextManager[tuple[Path, memoryview] | None]]
"""A function that returns the path of an overlay's file and the chunk in LMDB's map, or None if the chunk is gone."""


class ChunkGone(Exception):
    """The chunk no longer exists: its segment was replaced meanwhile, or is missing."""


class Rereader:
    """Reads chunks again, with buffers of its own. Only one thread may use it at a time."""

    def __init__(self) -> None:
        self._block = np.frombuffer(mmap.mmap(-1, BLOCK_BYTES), np.uint8)
        self._other = np.frombuffer(mmap.mmap(-1, BLOCK_BYTES), np.uint8)

    def base_chunk(self, path: Path, offset: int, origin: str) -> Iterator[int]:
        """Verify the base chunk that begins at a byte offset of a file. Yield the size of each block that was read.

        Raises:
            ChunkGone: the file does not exist.
            StoreDamaged: the bytes differ from those that were written, or the disk cannot read them.
            OSError: the operating system cannot read the file now.
        """
        try:
            with _File(path) as file:
                head = file.read_through_cache(offset, self._block[:HEADER_SIZE])
                size = _chunk_size(head, file.size - offset, origin)
                digest = _Digest(size, origin)
                first = offset // PAGE * PAGE
                for start in range(first, offset + size, BLOCK_BYTES):
                    whole_pages = -(-(offset + size - start) // PAGE) * PAGE
                    length = min(BLOCK_BYTES, whole_pages, file.size - start)
                    block = file.read(start, self._block[:length], self._other[:length], origin)
                    digest.add(block[offset - first :] if start == first else block)
                    yield length
                digest.check()
        except FileNotFoundError as error:
            raise ChunkGone(f"{origin}: {error}") from None
        except OSError as error:
            raise _named(error, origin) from error

    def copy_from_disk(self, path: Path, copy: Path, base: SegmentRecord) -> None:
        """Copy a base's file from the disk past the page cache, sync the copy to the disk, and verify it.

        Raises:
            StoreDamaged: the file on the disk is damaged, or cannot be read past the page cache.
            OSError: the file cannot be read now, or the copy cannot be written now.
        """
        origin = f"generation {base.id}"
        with _File(path) as file, copy.open("wb") as target:
            for start in range(0, file.size, BLOCK_BYTES):
                block = file.read_directly(start, self._block[: min(BLOCK_BYTES, file.size - start)])
                if block is None:
                    raise StoreDamaged(f"{origin} is on a file system without direct reads (O_DIRECT)")
                target.write(block.data)
            target.flush()
            os.fsync(target.fileno())
        for chunk, offset in enumerate(base.offsets):
            for _ in self.base_chunk(copy, offset, f"{origin} chunk {chunk} on the disk"):
                pass

    def overlay_chunk(self, chunk: OverlayChunk, origin: str) -> Iterator[int]:
        """Verify a chunk of an overlay. Yield the size of each block that was read.

        Each block is read in a transaction of its own, and the transaction ends before the block is hashed. One
        transaction for the whole chunk would keep old pages from being reused. Separate transactions are safe: a chunk
        neither moves nor changes while the catalog names its overlay.

        Raises:
            ChunkGone, StoreDamaged, OSError: as `base_chunk`.
        """
        digest, position, size = None, 0, 1
        while position < size:
            with chunk() as found:
                if found is None:
                    raise ChunkGone(origin)
                path, value = found
                if digest is None:
                    size = _chunk_size(value, len(value), origin)
                    digest = _Digest(size, origin)
                block = self._overlay_block(path, value, position, size, origin)
            digest.add(block)
            position += block.size
            yield block.size
        assert digest is not None
        digest.check()

    def _overlay_block(self, path: Path, value: memoryview, position: int, size: int, origin: str) -> _Bytes:
        """Return a value's bytes from a position on, as memory holds them, and compare them with the disk.

        The bytes end at the end of a page, or at the end of the value.

        Raises:
            StoreDamaged: memory and the disk hold different bytes, or the disk cannot read them.
        """
        length = min(BLOCK_BYTES - (HEADER if position == 0 else 0), size - position)
        shown = self._block[:length]
        content = np.frombuffer(value, np.uint8)
        np.copyto(shown, content[position : position + length])
        page, *_ = PAGE_HEAD.unpack(ctypes.string_at(address_of(content) - HEADER, PAGE_HEAD.size))
        begin = page * PAGE + HEADER + position
        start = begin // PAGE * PAGE
        aligned = self._other[: -(-(begin + length - start) // PAGE) * PAGE]
        try:
            with _File(path) as file:
                on_disk = file.read_directly(start, aligned)
        except OSError as error:
            raise _named(error, origin) from error
        if on_disk is not None and not np.array_equal(on_disk[begin - start : begin - start + length], shown):
            raise _differs(origin, position, length)
        return shown


class _File:
    """A file that can be read from its disk and compared with its pages in the page cache."""

    def __init__(self, path: Path) -> None:
        self._cached = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._direct: int | None = None
        self._map: _Bytes | None = None
        # A file system without direct reads refuses either this open, or the first read.
        with suppress(OSError):
            self._direct = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        os.posix_fadvise(self._cached, 0, 0, os.POSIX_FADV_RANDOM)
        self.size = os.fstat(self._cached).st_size

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._cached)
        if self._direct is not None:
            os.close(self._direct)

    def read(self, start: int, block: _Bytes, other: _Bytes, origin: str) -> _Bytes:
        """Read a block of whole pages from the disk, and compare it with the page cache.

        Args:
            block: the buffer to read into, which is also returned.
            other: a buffer of the same size for the cached pages.

        Raises:
            StoreDamaged: memory and the disk hold different bytes.
        """
        resident = self._resident(start, block.size)
        if self.read_directly(start, block) is None:
            self.read_through_cache(start, block)
            for first, end in _runs(~resident):
                os.posix_fadvise(self._cached, start + first * PAGE, (end - first) * PAGE, os.POSIX_FADV_DONTNEED)
            return block
        for first, end in _runs(resident):
            run = slice(first * PAGE, end * PAGE)
            if not np.array_equal(self.read_through_cache(start + first * PAGE, other[run]), block[run]):
                raise _differs(origin, start + first * PAGE, (end - first) * PAGE)
        return block

    def read_directly(self, start: int, block: _Bytes) -> _Bytes | None:
        """Read whole pages from the disk into a buffer. Return None if the file system has no direct reads."""
        if self._direct is None:
            return None
        try:
            return _read(self._direct, start, block)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            os.close(self._direct)
            self._direct = None
            return None

    def read_through_cache(self, start: int, block: _Bytes) -> _Bytes:
        """Read bytes through the page cache, which loads missing pages from the disk."""
        return _read(self._cached, start, block)

    def _resident(self, start: int, length: int) -> npt.NDArray[np.bool_]:
        """Return bool[pages]: whether each page of a range is in memory.

        The map serves only as the address range for `mincore`; its bytes are never read.
        """
        if self._map is None:
            self._map = np.frombuffer(mmap.mmap(self._cached, 0, prot=mmap.PROT_READ), np.uint8)
        assert start % PAGE == 0
        pages = np.zeros(-(-length // PAGE), np.uint8)
        address = ctypes.c_void_p(address_of(self._map) + start)
        if _libc.mincore(address, ctypes.c_size_t(length), ctypes.c_void_p(address_of(pages))):
            raise OSError(ctypes.get_errno(), "mincore failed")
        return (pages & 1).astype(np.bool_)


class _Digest:
    """The checksum of a chunk that is read in parts. The first part contains the whole header."""

    def __init__(self, size: int, origin: str) -> None:
        self._size = size
        self._origin = origin
        self._stated = 0
        self._hash: xxhash.xxh3_64 | None = None
        self._left = size

    def add(self, part: _Bytes) -> None:
        """Add the next bytes of the chunk. Bytes after its end are ignored."""
        part = part[: self._left]
        self._left -= part.size
        if self._hash is None:
            self._stated = int.from_bytes(part[CHECKSUM_OFFSET : CHECKSUM_OFFSET + 8].tobytes(), "little")
            self._hash = chunk_digest(part)
        else:
            self._hash.update(part.data)

    def check(self) -> None:
        """Raise StoreDamaged if the bytes differ from those that were written."""
        assert self._hash is not None
        found = self._hash.intdigest()
        if self._left or found != self._stated:
            raise StoreDamaged(f"{self._origin} has the checksum {found:016x}, its header states {self._stated:016x}")


def _chunk_size(head: "_Bytes | memoryview", most: int, origin: str) -> int:
    """Return the size in bytes that a chunk's header states.

    Raises:
        StoreDamaged: the header is invalid, or states a size above `most`.
    """
    size = ChunkHeader.stated_size(bytes(head[:HEADER_SIZE]), origin)
    if not HEADER_SIZE <= size <= most:
        raise StoreDamaged(f"{origin}: the header states {size} bytes, but {most} are stored")
    return size


def _read(descriptor: int, start: int, block: _Bytes) -> _Bytes:
    done = 0
    while done < block.size:
        count = os.preadv(descriptor, [block[done:].data], start + done)
        if not count:
            raise OSError(errno.EIO, f"the file ends at byte {start + done}")
        done += count
    return block


def _runs(flags: npt.NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Yield the ranges of consecutive positions with set flags, as (first, end); `end` is exclusive."""
    bounds = np.flatnonzero(np.diff(flags.astype(np.int8), prepend=0, append=0))
    yield from zip(bounds[::2].tolist(), bounds[1::2].tolist(), strict=True)


def _differs(origin: str, start: int, length: int) -> StoreDamaged:
    return StoreDamaged(
        f"{origin}: memory and the disk have different bytes between {start} and {start + length}; one of them failed"
    )


def _named(error: OSError, origin: str) -> Exception:
    """Return StoreDamaged if an error says that the disk failed, or else the error itself.

    Other errors, such as too many open files, say nothing about the stored bytes.
    """
    if error.errno in _DISK_FAILS:
        return StoreDamaged(f"{origin} cannot be read from the disk: {error}")
    return error


_libc = ctypes.CDLL(None, use_errno=True)
