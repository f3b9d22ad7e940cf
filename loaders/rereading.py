"""Read a stored chunk again, and verify its checksum: on the disk, and in memory where the system has it cached.

Workers serve the page cache: a flipped bit in memory is served, and a flipped bit on the disk is served once
its page was evicted and read again. So each block is read from the disk itself (O_DIRECT), and compared with the pages
of it that are in memory. Nothing is cached by that and nothing is evicted. Some file systems do not read past their
cache. There the block is read through the cache, and pages that were not in it before are evicted again; damage
on the disk under a cached page is found only after that page is evicted.

Files are read by system calls, not by a map: a disk that fails gives an error, where a map would end the process.
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

from engine.catalog import SegmentRecord
from engine.errors import StoreDamaged
from engine.kernels.memory import address_of
from engine.layout import CHECKSUM_OFFSET, HEADER_SIZE, ChunkHeader
from engine.lmdb_file import HEADER, PAGE_HEAD
from engine.segment import chunk_digest

BLOCK_BYTES = 2 << 20
PAGE = mmap.PAGESIZE
_DISK_FAILS = (errno.EIO, errno.EBADMSG, errno.EUCLEAN, errno.ENODATA, errno.EREMOTEIO)
"""What the system says of a disk, or of a file system, that does not give back what was written."""

_Bytes = npt.NDArray[np.uint8]
OverlayChunk = Callable[[], AbstractContextManager[tuple[Path, memoryview] | None]]
"""Gives a chunk of an overlay as LMDB's map shows it, and the file that it lies in; None if it is gone."""


class ChunkGone(Exception):
    """The chunk is no longer there: its segment was replaced meanwhile, or is missing."""


class Rereader:
    """The buffers to read chunks again with. One thread uses them at a time."""

    def __init__(self) -> None:
        self._block = np.frombuffer(mmap.mmap(-1, BLOCK_BYTES), np.uint8)
        self._other = np.frombuffer(mmap.mmap(-1, BLOCK_BYTES), np.uint8)

    def base_chunk(self, path: Path, offset: int, origin: str) -> Iterator[int]:
        """Verify the chunk of a base that begins at a byte of a file; gives the size of each block that was read.

        Raises:
            ChunkGone: there is no such file.
            StoreDamaged: the bytes are not those that were written, or the disk does not give them.
            OSError: the system does not let the file be read now.
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
        """Copy a base's file from the disk, bypassing the page cache, and verify the copy. The copy is synced to the
        disk.

        Raises:
            StoreDamaged: the file on the disk is damaged, or cannot be read past the page cache.
            OSError: the file cannot be read, or the copy cannot be written, now.
        """
        origin = f"generation {base.id}"
        with _File(path) as file, copy.open("wb") as target:
            for start in range(0, file.size, BLOCK_BYTES):
                block = file.read_directly(start, self._block[: min(BLOCK_BYTES, file.size - start)])
                if block is None:
                    raise StoreDamaged(f"{origin} is on a file system that cannot be read past its cache")
                target.write(block.data)
            target.flush()
            os.fsync(target.fileno())
        for chunk, offset in enumerate(base.offsets):
            for _ in self.base_chunk(copy, offset, f"{origin} chunk {chunk} on the disk"):
                pass

    def overlay_chunk(self, chunk: OverlayChunk, origin: str) -> Iterator[int]:
        """Verify a chunk of an overlay; gives the size of each block that was read.

        Each block is read in a transaction of its own, which is over before the block is hashed: a chunk stays where it
        is and as it is while its overlay is named, and one transaction for all of it would hold old pages meanwhile.

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
        """Bytes of a value up to the end of a page, as memory has them; compared with those on the disk."""
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
    """A file to read from its disk, and to compare with what memory has of it."""

    def __init__(self, path: Path) -> None:
        self._cached = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._direct: int | None = None
        self._map: _Bytes | None = None
        # Other file systems refuse to be read past their cache when the file is opened, or only when it is read.
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
        """A block of whole pages into a buffer, from the disk; `other` is room for what memory has of it.

        Raises:
            StoreDamaged: memory has other bytes than the disk.
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
        """Whole pages from the disk; None where the file system does not read past its cache."""
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
        """Bytes as the page cache has them, which reads from the disk what it has not."""
        return _read(self._cached, start, block)

    def _resident(self, start: int, length: int) -> npt.NDArray[np.bool_]:
        """bool[pages]: which pages of a range are in memory. The map is only asked about, and never touched."""
        if self._map is None:
            self._map = np.frombuffer(mmap.mmap(self._cached, 0, prot=mmap.PROT_READ), np.uint8)
        assert start % PAGE == 0
        pages = np.zeros(-(-length // PAGE), np.uint8)
        address = ctypes.c_void_p(address_of(self._map) + start)
        if _libc.mincore(address, ctypes.c_size_t(length), ctypes.c_void_p(address_of(pages))):
            raise OSError(ctypes.get_errno(), "mincore failed")
        return (pages & 1).astype(np.bool_)


class _Digest:
    """The checksum of a chunk that comes in parts. The first part contains the whole header."""

    def __init__(self, size: int, origin: str) -> None:
        self._size = size
        self._origin = origin
        self._stated = 0
        self._hash: xxhash.xxh3_64 | None = None
        self._left = size

    def add(self, part: _Bytes) -> None:
        """The next bytes of the chunk; what lies behind its end is ignored."""
        part = part[: self._left]
        self._left -= part.size
        if self._hash is None:
            self._stated = int.from_bytes(part[CHECKSUM_OFFSET : CHECKSUM_OFFSET + 8].tobytes(), "little")
            self._hash = chunk_digest(part)
        else:
            self._hash.update(part.data)

    def check(self) -> None:
        """Raise StoreDamaged if the bytes are not those that were written."""
        assert self._hash is not None
        found = self._hash.intdigest()
        if self._left or found != self._stated:
            raise StoreDamaged(f"{self._origin} has the checksum {found:016x}, it states {self._stated:016x}")


def _chunk_size(head: "_Bytes | memoryview", most: int, origin: str) -> int:
    """The size that a chunk's header states.

    Raises:
        StoreDamaged: the header makes no sense, or states more than there is.
    """
    size = ChunkHeader.stated_size(bytes(head[:HEADER_SIZE]), origin)
    if not HEADER_SIZE <= size <= most:
        raise StoreDamaged(f"{origin}: the header says {size} bytes, {most} are stored")
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
    """The ranges of positions, without their ends, in which flags are set."""
    bounds = np.flatnonzero(np.diff(flags.astype(np.int8), prepend=0, append=0))
    yield from zip(bounds[::2].tolist(), bounds[1::2].tolist(), strict=True)


def _differs(origin: str, start: int, length: int) -> StoreDamaged:
    return StoreDamaged(
        f"{origin}: memory and the disk have different bytes between {start} and {start + length}: one of them failed"
    )


def _named(error: OSError, origin: str) -> Exception:
    """A disk that fails is damage; that the system has no descriptors left, say, is not."""
    if error.errno in _DISK_FAILS:
        return StoreDamaged(f"{origin} cannot be read from the disk: {error}")
    return error


_libc = ctypes.CDLL(None, use_errno=True)
