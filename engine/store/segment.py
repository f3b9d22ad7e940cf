"""Read a segment: its chunks in the map, and the program that gathers features from the segment. The features may be
from a newer schema than the segment."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import xxhash

from shoal.engine.base.errors import LOAD_AGAIN, StoreDamaged
from shoal.engine.format.catalog import SegmentRecord
from shoal.engine.format.layout import (
    CHECKSUM_OFFSET,
    FIRST_FEATURE_BIT,
    ChunkHeader,
    RowLayout,
    ValueStorage,
    storage_of,
    width_of,
)
from shoal.engine.format.schema import Feature, embedding_size
from shoal.engine.kernels import finding, gathering, matrix
from shoal.engine.kernels.gathering import Operation
from shoal.engine.kernels.matrix import Number
from shoal.engine.kernels.memory import address_of

_COPIES = {
    ValueStorage.BYTE: Operation.COPY_1,
    ValueStorage.WORD_4: Operation.COPY_4,
    ValueStorage.WORD_8: Operation.COPY_8,
    ValueStorage.INLINE: Operation.COPY_INLINE,
    ValueStorage.HEAP: Operation.HEAP_REFERENCE,
}
_WIDENINGS = {
    ("int32", "int64"): Operation.INT32_TO_INT64,
    ("int32", "float64"): Operation.INT32_TO_FLOAT64,
    ("float32", "float64"): Operation.FLOAT32_TO_FLOAT64,
}
_HEAP_SLOT = 16

NUMBERS = {
    "bool": Number.BOOL,
    "int32": Number.INT32,
    "int64": Number.INT64,
    "float32": Number.FLOAT32,
    "float64": Number.FLOAT64,
    "timestamp": Number.MICROSECONDS,
}
"""The feature types that take one column of a matrix. An embedding takes one column per element."""


class Chunk:
    """One chunk in the map. The chunk is valid as long as the transaction or the map behind its value exists."""

    def __init__(self, value: "memoryview | bytes", origin: str) -> None:
        self._set(ChunkHeader.unpack(value, origin), np.frombuffer(value, np.uint8), origin)

    @classmethod
    def in_memory(cls, header: ChunkHeader, content: npt.NDArray[np.uint8], origin: str) -> Self:
        """Return a chunk that is not in a store. The chunk owns its memory, `content`."""
        chunk = cls.__new__(cls)
        chunk._set(header, content, origin)
        return chunk

    def _set(self, header: ChunkHeader, content: npt.NDArray[np.uint8], origin: str) -> None:
        self.header = header
        self.bytes = content
        self.address = address_of(content)
        self.origin = origin

    def table_row(self, segment: int) -> list[int]:
        """Return this chunk's row of the chunk table (see `shoal.engine.kernels.finding`)."""
        header = self.header
        row = [0] * finding.CHUNK_COLUMNS
        row[finding.MIN_HASH] = header.min_hash
        row[finding.MAX_HASH] = header.max_hash
        row[finding.SHIFT] = header.shift
        row[finding.DIRECTORY] = self.address + header.directory
        row[finding.HASHES] = self.address + header.hashes
        row[finding.ROW_DATA] = self.address + header.row_data
        row[finding.STRIDE] = header.stride
        row[finding.HEAP] = self.address + header.heap
        row[finding.SEGMENT] = segment
        row[finding.ROWS] = header.rows
        row[finding.HEAP_SIZE] = header.keys - header.heap
        return row

    def section(self, start: int, dtype: npt.DTypeLike, count: int) -> npt.NDArray[Any]:
        """Return `count` values of a section that begins at byte `start`, not copied (a slice of the chunk's bytes)."""
        size = np.dtype(dtype).itemsize * count
        return self.bytes[start : start + size].view(dtype)

    @property
    def hashes(self) -> npt.NDArray[np.int64]:
        """The first hashes of the rows, int64[rows], ascending, not copied (a slice of the chunk's bytes)."""
        return self.section(self.header.hashes, np.int64, self.header.rows)

    @property
    def rows(self) -> npt.NDArray[np.uint8]:
        """The bytes of the rows, uint8[rows, stride], not copied (a slice of the chunk's bytes)."""
        size = self.header.rows * self.header.stride
        return self.section(self.header.row_data, np.uint8, size).reshape(self.header.rows, self.header.stride)

    def row_at(self, address: int) -> int:
        """Return the number of the row at an address."""
        return (address - self.address - self.header.row_data) // self.header.stride

    def origin_of(self, row: int) -> int:
        """Return the position of a row's origin in the segment's origins."""
        if not self.header.origins:
            return 0
        return int(self.section(self.header.origins, np.uint16, self.header.rows)[row])

    def key_of(self, row: int) -> bytes:
        """Return a row's key: for each join key, an int64 as 8 bytes, or a string as its length (uint32) and its bytes.
        The key of a tombstone is empty."""
        start, end = self.section(self.header.key_offsets, np.uint32, self.header.rows + 1)[row : row + 2]
        return self.bytes[self.header.keys + int(start) : self.header.keys + int(end)].tobytes()

    def verify_checksum(self) -> None:
        """Check only the checksum.

        Raises:
            StoreDamaged: the chunk's bytes have changed since they were written.
        """
        found = chunk_checksum(self.bytes[: self.header.total])
        if found != self.header.checksum:
            raise StoreDamaged(f"{self.origin} has the checksum {found:016x}, but states {self.header.checksum:016x}")

    def verify(self) -> None:
        """Check the checksum, the order of the hashes, and that the directory matches the hashes.

        Raises:
            StoreDamaged: a check fails; the message names it.
        """
        self.verify_checksum()
        header = self.header
        hashes = self.hashes
        seconds = self.rows[:, :8].copy().view(np.int64)[:, 0]
        same = hashes[1:] == hashes[:-1]
        if np.any(hashes[1:] < hashes[:-1]) or np.any(same & (seconds[1:] <= seconds[:-1])):
            raise StoreDamaged(f"{self.origin}: its rows are not sorted by their hashes")
        if hashes[0] != header.min_hash or hashes[-1] != header.max_hash:
            raise StoreDamaged(f"{self.origin}: its hashes do not match the range in its header")
        buckets = (hashes - np.int64(header.min_hash)).view(np.uint64) >> np.uint64(header.shift)
        expected = np.searchsorted(buckets, np.arange(header.buckets + 1, dtype=np.uint64))
        if np.any(expected != self.section(header.directory, np.uint32, header.buckets + 1)):
            raise StoreDamaged(f"{self.origin}: its directory does not match its hashes")


@dataclass(frozen=True)
class Segment:
    """One segment: its record in the catalog, and its chunks in ascending order of hashes."""

    record: SegmentRecord
    chunks: Sequence[Chunk]

    def __post_init__(self) -> None:
        """Check the properties of the chunks that the kernels rely on.

        Raises:
            StoreDamaged: the rows of a chunk do not have the layout of the record's schema, or a chunk does not begin
                after the end of the chunk before it.
        """
        stride = RowLayout(self.record.view_schema).stride
        behind = None
        for chunk in self.chunks:
            if chunk.header.stride != stride:
                raise StoreDamaged(
                    f"{chunk.origin} has rows of {chunk.header.stride} bytes, but rows of its schema take {stride}; "
                    f"{LOAD_AGAIN}"
                )
            if behind is not None and chunk.header.min_hash <= behind:
                raise StoreDamaged(
                    f"{chunk.origin} begins at the hash {chunk.header.min_hash}, but the chunk before it ends at "
                    f"{behind}; {LOAD_AGAIN}"
                )
            behind = chunk.header.max_hash

    def instructions(self, features: Sequence[Feature]) -> list[list[int]]:
        """Return one row of instructions per feature: how to gather `features` from this segment's rows (see
        `shoal.engine.kernels.gathering`)."""
        layout = RowLayout(self.record.view_schema)
        return [self._instruction(layout, feature) for feature in features]

    def numbers(self, features: Sequence[Feature], columns: Sequence[int]) -> list[list[int]]:
        """Return one row of instructions per feature: how to copy the numeric `features` to the `columns` of a matrix
        (see `shoal.engine.kernels.matrix`)."""
        layout = RowLayout(self.record.view_schema)
        rows = []
        for feature, column in zip(features, columns, strict=True):
            row = [0] * matrix.PROGRAM_COLUMNS
            row[matrix.COLUMN] = column
            row[matrix.WIDTH] = matrix_width(feature)
            index = _source(layout, feature)
            if index is not None:
                row[matrix.KIND] = int(NUMBERS.get(layout.schema.features[index].type, Number.FLOATS))
                row[matrix.OFFSET] = layout.offsets[index]
                row[matrix.PRESENCE_BIT] = FIRST_FEATURE_BIT + index
            rows.append(row)
        return rows

    def _instruction(self, layout: RowLayout, feature: Feature) -> list[int]:
        instruction = [int(Operation.ABSENT)] + [0] * (gathering.PROGRAM_COLUMNS - 1)
        index = _source(layout, feature)
        if index is not None:
            stored = layout.schema.features[index].type
            operation = _copy_of(stored) if stored == feature.type else _WIDENINGS[stored, feature.type]
            instruction[gathering.OPERATION] = int(operation)
            instruction[gathering.OFFSET] = layout.offsets[index]
            instruction[gathering.PRESENCE_BIT] = FIRST_FEATURE_BIT + index
        return instruction


def _copy_of(feature_type: str) -> Operation:
    return Operation.COPY_TIME if feature_type == "timestamp" else _COPIES[storage_of(feature_type)]


def _source(layout: RowLayout, feature: Feature) -> int | None:
    """Return the position of the stored feature from which `feature` is read. Return None if the segment has no feature
    of this name, or only one with an incompatible type."""
    index = layout.schema.feature_index.get(feature.name)
    if index is None:
        return None
    stored = layout.schema.features[index].type
    return index if stored == feature.type or (stored, feature.type) in _WIDENINGS else None


def matrix_width(feature: Feature) -> int:
    """Return the number of columns of a feature in a matrix; 0 if the feature is not numeric."""
    return 1 if feature.type in NUMBERS else embedding_size(feature.type) or 0


def output_row(feature: Feature) -> list[int]:
    """Return a feature's row of the table of output columns (see `shoal.engine.kernels.gathering`)."""
    row = [0] * gathering.OUTPUT_COLUMNS
    in_heap = storage_of(feature.type) is ValueStorage.HEAP
    row[gathering.WIDTH] = _HEAP_SLOT if in_heap else width_of(feature.type)
    if feature.type == "float64":
        row[gathering.NULL_PATTERN] = int(np.array(np.nan, np.float64).view(np.int64))
    elif feature.type == "float32" or embedding_size(feature.type):
        bits = int(np.array(np.nan, np.float32).view(np.int32))
        row[gathering.NULL_PATTERN] = bits << 32 | bits
    return row


def chunk_table(segments: Sequence[Segment]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the chunk table of segments, newest first, and the position of each segment's first chunk in the table."""
    rows = [chunk.table_row(position) for position, segment in enumerate(segments) for chunk in segment.chunks]
    starts = np.cumsum([0, *(len(segment.chunks) for segment in segments)], dtype=np.int64)
    # A kernel reads the first row of the table for a key that was not found. So the table has a row even if there are
    # no chunks.
    return np.array(rows or [[0] * finding.CHUNK_COLUMNS], np.int64), starts


def chunk_checksum(value: npt.NDArray[np.uint8]) -> int:
    """Return the XXH3 (64 bits) of a chunk, with its checksum field as zero."""
    return chunk_digest(value).intdigest()


def chunk_digest(head: npt.NDArray[np.uint8]) -> xxhash.xxh3_64:
    """Return the hash object of a chunk's checksum, updated with the chunk's first bytes. `head` must contain at least
    the whole header."""
    digest = xxhash.xxh3_64(head[:CHECKSUM_OFFSET].data)
    digest.update(bytes(8))
    digest.update(head[CHECKSUM_OFFSET + 8 :].data)
    return digest
