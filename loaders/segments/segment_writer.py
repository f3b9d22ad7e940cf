"""Build one chunk of a segment in memory and seal it: header, directory, checksum.

This module does not know where the rows come from: `shoal.loaders.segments.arrow_rows` encodes published rows, and
`shoal.loaders.segments.merge` copies stored rows.
"""

import mmap
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from shoal.engine.format.layout import (
    CHECKSUM_OFFSET,
    HEADER_SIZE,
    PUSHED,
    ROW_PRESENCE,
    TOMBSTONE,
    ChunkHeader,
    RowLayout,
    most_buckets,
    section_start,
)
from shoal.engine.kernels.compiling import kernel
from shoal.engine.kernels.memory import address_of, load_i64, store_i32
from shoal.engine.store.segment import chunk_checksum

MIN_CHUNK_BYTES = mmap.PAGESIZE
"""The minimum size of a chunk in bytes. A smaller LMDB value would share its page with other values, and would move
when the other values change."""


class GrowingBuffer:
    """A buffer that grows at its end. Its addresses and views are valid until the next `reserve`."""

    def __init__(self) -> None:
        self.size = 0
        self._memory = np.empty(0, np.uint8)

    def begin(self, size: int) -> None:
        """Discard the content and begin with `size` zero bytes, in the same memory if it is large enough."""
        self.size = 0
        self.reserve(size)
        self.content[:] = 0

    def reserve(self, count: int) -> int:
        """Make room for `count` bytes, count them as written, and return the address to write them to."""
        start = self.size
        self.size += count
        if self.size > self._memory.size:
            larger = np.empty(self.size + self.size // 2, np.uint8)
            larger[:start] = self._memory[:start]
            self._memory = larger
        return address_of(self._memory) + start

    @property
    def content(self) -> npt.NDArray[np.uint8]:
        """A view of the bytes so far, uint8[size]."""
        return self._memory[: self.size]


@dataclass(frozen=True)
class ChunkMemory:
    """The memory that a chunk is built in.

    It may be used for one chunk after the other. This saves time, because the operating system takes longer to provide
    new memory pages than it takes to fill them.
    """

    chunk: GrowingBuffer = field(default_factory=GrowingBuffer)
    keys: GrowingBuffer = field(default_factory=GrowingBuffer)


class ChunkBuilder:
    """A chunk that is being built, with exactly `rows` rows. The caller fills in all rows before it calls `finish`.

    Variable-length values go behind `heap_start` in `buffer`. Keys go into `keys`, one after the other.
    """

    def __init__(self, layout: RowLayout, rows: int, *, with_origins: bool, memory: ChunkMemory | None = None) -> None:
        self.layout = layout
        self.rows = rows
        self._hashes = section_start(HEADER_SIZE)
        self._row_data = section_start(self._hashes + 8 * rows)
        self._key_offsets = section_start(self._row_data + layout.stride * rows)
        end = self._key_offsets + 4 * (rows + 1)
        self._origins = section_start(end) if with_origins else 0
        self._directory = section_start(self._origins + 2 * rows if with_origins else end)
        self.heap_start = section_start(self._directory + 4 * (most_buckets(rows) + 3))
        memory = memory or ChunkMemory()
        self.buffer = memory.chunk
        self.keys = memory.keys
        self.buffer.begin(self.heap_start)
        self.keys.begin(0)

    @property
    def hashes(self) -> npt.NDArray[np.int64]:
        """The first hash of each row, int64[rows]. The caller fills them in, in ascending order."""
        return self._section(self._hashes, np.int64, self.rows)

    @property
    def row_address(self) -> int:
        """The address of the first row. All rows are zero at first."""
        return address_of(self.buffer.content) + self._row_data

    @property
    def key_offsets(self) -> npt.NDArray[np.uint32]:
        """The position in `keys` where each row's key begins, and the end of the last key: uint32[rows + 1]. The caller
        fills them in."""
        return self._section(self._key_offsets, np.uint32, self.rows + 1)

    @property
    def origins(self) -> npt.NDArray[np.uint16]:
        """The origin of each row, as a position in the segment's origins: uint16[rows]. The caller fills them in."""
        return self._section(self._origins, np.uint16, self.rows)

    @property
    def heap_size(self) -> int:
        """The size of all variable-length values so far, in bytes."""
        return self.buffer.size - self.heap_start

    @property
    def tombstones(self) -> int:
        """The number of rows that are tombstones."""
        return self._count(TOMBSTONE)

    @property
    def pushed(self) -> int:
        """The number of rows that were pushed, tombstones included."""
        return self._count(PUSHED)

    def _count(self, state: int) -> int:
        rows = self._section(self._row_data, np.uint8, self.layout.stride * self.rows)
        return int(np.count_nonzero(rows[ROW_PRESENCE :: self.layout.stride] & state))

    def finish(self) -> npt.NDArray[np.uint8]:
        """Return the sealed chunk, uint8[bytes], in the builder's memory. Do not use the builder afterwards."""
        lowest = int(self.hashes[0])
        highest = int(self.hashes[-1])
        shift = next(shift for shift in range(64) if (highest - lowest) >> shift < most_buckets(self.rows))
        buckets = ((highest - lowest) >> shift) + 1
        heap_end = self.buffer.size
        self.buffer.reserve(max(self.keys.size, MIN_CHUNK_BYTES - heap_end))
        value = self.buffer.content
        keys_end = heap_end + self.keys.size
        value[heap_end:keys_end] = self.keys.content
        value[keys_end:] = 0
        fill_directory(address_of(self.hashes), self.rows, shift, address_of(value) + self._directory, buckets)
        header = ChunkHeader(
            stride=self.layout.stride,
            rows=self.rows,
            min_hash=lowest,
            max_hash=highest,
            shift=shift,
            buckets=buckets,
            hashes=self._hashes,
            row_data=self._row_data,
            key_offsets=self._key_offsets,
            origins=self._origins,
            directory=self._directory,
            heap=self.heap_start,
            keys=heap_end,
            total=value.size,
            checksum=0,
        )
        value[:HEADER_SIZE] = np.frombuffer(header.pack(), np.uint8)
        value[CHECKSUM_OFFSET : CHECKSUM_OFFSET + 8].view(np.uint64)[0] = chunk_checksum(value)
        return value

    def _section(self, start: int, dtype: npt.DTypeLike, count: int) -> npt.NDArray[Any]:
        return self.buffer.content[start : start + np.dtype(dtype).itemsize * count].view(dtype)


@kernel
def fill_directory(hashes: int, rows: int, shift: int, directory: int, buckets: int) -> None:
    """For each bucket, write the number of the first row with a hash in this bucket or a later bucket. Then write the
    total number of rows."""
    lowest = load_i64(hashes)
    bucket = 0
    for row in range(rows):
        here = np.int64(np.uint64(load_i64(hashes + 8 * row) - lowest) >> np.uint64(shift))
        while bucket <= here:
            store_i32(directory + 4 * bucket, row)
            bucket += 1
    while bucket <= buckets:
        store_i32(directory + 4 * bucket, rows)
        bucket += 1
