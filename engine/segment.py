"""Read a segment: its chunks in the map, and the program by which features of a newer schema are gathered from it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import xxhash

from engine.catalog import SegmentRecord
from engine.errors import LOAD_AGAIN, StoreDamaged
from engine.kernels import finding, gathering, matrix
from engine.kernels.gathering import Operation
from engine.kernels.matrix import Number
from engine.kernels.memory import address_of
from engine.layout import CHECKSUM_OFFSET, FIRST_FEATURE_BIT, ChunkHeader, RowLayout, Storage, storage_of, width_of
from engine.schema import Feature, embedding_size

_COPIES = {
    Storage.BYTE: Operation.COPY_1,
    Storage.WORD_4: Operation.COPY_4,
    Storage.WORD_8: Operation.COPY_8,
    Storage.INLINE: Operation.COPY_INLINE,
    Storage.HEAP: Operation.HEAP_REFERENCE,
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
"""The types that make one column of a matrix; an embedding makes as many as it is long."""


class Chunk:
    """One chunk in the map. It is valid as long as the transaction that `value` came from."""

    def __init__(self, value: "memoryview | bytes", origin: str) -> None:
        self._set(ChunkHeader.unpack(value, origin), np.frombuffer(value, np.uint8), origin)

    @classmethod
    def in_memory(cls, header: ChunkHeader, content: npt.NDArray[np.uint8], origin: str) -> Self:
        """A chunk that was never written, in memory that it owns."""
        chunk = cls.__new__(cls)
        chunk._set(header, content, origin)
        return chunk

    def _set(self, header: ChunkHeader, content: npt.NDArray[np.uint8], origin: str) -> None:
        self.header = header
        self.bytes = content
        self.address = address_of(content)
        self.origin = origin

    def table_row(self, segment: int) -> list[int]:
        """This chunk's row of the chunk table (see `engine.kernels.finding`)."""
        header, row = self.header, [0] * finding.CHUNK_COLUMNS
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
        """`count` values of a section that begins at byte `start`, as a view of the map."""
        size = np.dtype(dtype).itemsize * count
        return self.bytes[start : start + size].view(dtype)

    @property
    def hashes(self) -> npt.NDArray[np.int64]:
        """int64[rows], ascending: a view of the map."""
        return self.section(self.header.hashes, np.int64, self.header.rows)

    @property
    def rows(self) -> npt.NDArray[np.uint8]:
        """uint8[rows, stride]: a view of the map."""
        size = self.header.rows * self.header.stride
        return self.section(self.header.row_data, np.uint8, size).reshape(self.header.rows, self.header.stride)

    def row_at(self, address: int) -> int:
        """The number of the row that stands at an address."""
        return (address - self.address - self.header.row_data) // self.header.stride

    def origin_of(self, row: int) -> int:
        """The position in the segment's origins of what wrote a row."""
        if not self.header.origins:
            return 0
        return int(self.section(self.header.origins, np.uint16, self.header.rows)[row])

    def key_of(self, row: int) -> bytes:
        """A row's key: per join key, an int64 as 8 bytes or a string as its length (uint32) and its bytes. Empty for a
        tombstone."""
        start, end = self.section(self.header.key_offsets, np.uint32, self.header.rows + 1)[row : row + 2]
        return self.bytes[self.header.keys + int(start) : self.header.keys + int(end)].tobytes()

    def verify_checksum(self) -> None:
        """Check the checksum alone.

        Raises:
            StoreDamaged: the bytes are not those that were written.
        """
        found = chunk_checksum(self.bytes[: self.header.total])
        if found != self.header.checksum:
            raise StoreDamaged(f"{self.origin} has the checksum {found:016x}, it states {self.header.checksum:016x}")

    def verify(self) -> None:
        """Check the checksum, the order of the hashes and the directory against them.

        Raises:
            StoreDamaged: naming what is wrong.
        """
        self.verify_checksum()
        header = self.header
        hashes = self.hashes
        seconds = self.rows[:, :8].copy().view(np.int64)[:, 0]
        same = hashes[1:] == hashes[:-1]
        if np.any(hashes[1:] < hashes[:-1]) or np.any(same & (seconds[1:] <= seconds[:-1])):
            raise StoreDamaged(f"{self.origin}: its rows are not in the order of their hashes")
        if hashes[0] != header.min_hash or hashes[-1] != header.max_hash:
            raise StoreDamaged(f"{self.origin}: its hashes are not in the range that its header states")
        buckets = (hashes - np.int64(header.min_hash)).view(np.uint64) >> np.uint64(header.shift)
        expected = np.searchsorted(buckets, np.arange(header.buckets + 1, dtype=np.uint64))
        if np.any(expected != self.section(header.directory, np.uint32, header.buckets + 1)):
            raise StoreDamaged(f"{self.origin}: its directory does not fit its hashes")


@dataclass(frozen=True)
class Segment:
    """One segment: its record in the catalog, and its chunks in ascending order of hashes."""

    record: SegmentRecord
    chunks: Sequence[Chunk]

    def __post_init__(self) -> None:
        """Check what the kernels rely on of chunks together.

        Raises:
            StoreDamaged: a chunk has rows of another layout than the record's, or is not behind the one before.
        """
        stride, behind = RowLayout(self.record.view_schema).stride, None
        for chunk in self.chunks:
            if chunk.header.stride != stride:
                raise StoreDamaged(
                    f"{chunk.origin} has rows of {chunk.header.stride} bytes, those of its schema take {stride}; "
                    f"{LOAD_AGAIN}"
                )
            if behind is not None and chunk.header.min_hash <= behind:
                raise StoreDamaged(
                    f"{chunk.origin} begins at the hash {chunk.header.min_hash}, the chunk before it ends at {behind}; "
                    f"{LOAD_AGAIN}"
                )
            behind = chunk.header.max_hash

    def instructions(self, features: Sequence[Feature]) -> list[list[int]]:
        """How each of `features` is gathered from this segment's rows (see `engine.kernels.gathering`)."""
        layout = RowLayout(self.record.view_schema)
        return [self._instruction(layout, feature) for feature in features]

    def numbers(self, features: Sequence[Feature], columns: Sequence[int]) -> list[list[int]]:
        """How each of `features`, all numeric, gets into its column of a matrix (see `engine.kernels.matrix`)."""
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
    """The position of the stored feature that one is read from; None where it has only its name in common with one."""
    index = layout.schema.feature_index.get(feature.name)
    if index is None:
        return None
    stored = layout.schema.features[index].type
    return index if stored == feature.type or (stored, feature.type) in _WIDENINGS else None


def matrix_width(feature: Feature) -> int:
    """The columns that a feature takes in a matrix; 0 if it is not numeric."""
    return 1 if feature.type in NUMBERS else embedding_size(feature.type) or 0


def output_row(feature: Feature) -> list[int]:
    """A feature's row of the table of output columns (see `engine.kernels.gathering`)."""
    row = [0] * gathering.OUTPUT_COLUMNS
    in_heap = storage_of(feature.type) is Storage.HEAP
    row[gathering.WIDTH] = _HEAP_SLOT if in_heap else width_of(feature.type)
    if feature.type == "float64":
        row[gathering.NULL_PATTERN] = int(np.array(np.nan, np.float64).view(np.int64))
    elif feature.type == "float32" or embedding_size(feature.type):
        bits = int(np.array(np.nan, np.float32).view(np.int32))
        row[gathering.NULL_PATTERN] = bits << 32 | bits
    return row


def chunk_table(segments: Sequence[Segment]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The chunk table of segments, newest first, and where each one's chunks begin in it."""
    rows = [chunk.table_row(position) for position, segment in enumerate(segments) for chunk in segment.chunks]
    starts = np.cumsum([0, *(len(segment.chunks) for segment in segments)], dtype=np.int64)
    # A kernel reads the first row of the table for a key that was not found, so there is one even without chunks.
    return np.array(rows or [[0] * finding.CHUNK_COLUMNS], np.int64), starts


def chunk_checksum(value: npt.NDArray[np.uint8]) -> int:
    """XXH3 (64 bits) of a chunk, its checksum field taken as zero."""
    return chunk_digest(value).intdigest()


def chunk_digest(head: npt.NDArray[np.uint8]) -> xxhash.xxh3_64:
    """The hash that makes a chunk's checksum, of the first bytes of a chunk: at least of all of its header."""
    digest = xxhash.xxh3_64(head[:CHECKSUM_OFFSET].data)
    digest.update(bytes(8))
    digest.update(head[CHECKSUM_OFFSET + 8 :].data)
    return digest
