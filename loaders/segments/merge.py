"""Merge segments into one: the newest row of each key, in the layout of the newest schema.

Overlays are merged so that a lookup has to search only a few of them, and folded with their base so that they do not
outgrow the base. The rows are already in the order of their hashes, so a merge reads them once, one range of hashes at
a time.
"""

from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from shoal.engine.base.errors import LOAD_AGAIN, StoreDamaged
from shoal.engine.format.catalog import Origin
from shoal.engine.format.layout import (
    FIRST_FEATURE_BIT,
    HEAP_LENGTH_BITS,
    MAX_HEAP_VALUE,
    ROW_EVENT_TIME,
    ROW_PRESENCE,
    ROW_SECOND_HASH,
    ROW_STATE,
    TOMBSTONE,
    RowLayout,
    width_of,
)
from shoal.engine.format.schema import ViewSchema
from shoal.engine.kernels import finding
from shoal.engine.kernels.compiling import kernel
from shoal.engine.kernels.finding import HEAP, HEAP_SIZE, SEGMENT
from shoal.engine.kernels.gathering import (
    ABSENT,
    HEAP_REFERENCE,
    MISFIT,
    OFFSET,
    OPERATION,
    PRESENCE_BIT,
    copy_field,
    is_present,
    length_in_heap,
)
from shoal.engine.kernels.memory import copy_bytes, load_i64, load_u8, load_u32, store_i64, store_u8
from shoal.engine.store.segment import Segment, chunk_table
from shoal.loaders.segments.segment_writer import ChunkBuilder

# The columns of the table `cold`, int64[chunks, _COLD_COLUMNS]. A merge needs this table in addition to the chunk
# table.
_KEY_OFFSETS = 0
_KEYS = 1
_ORIGINS = 2
_KEYS_SIZE = 3
_COLD_COLUMNS = 4

_Int64s = npt.NDArray[np.int64]


class Fate(IntEnum):
    """The decision of a merge about the newest row of a key.

    A buried row is replaced by a published tombstone with the same event time.
    """

    LEFT_OUT = 0
    KEPT = 1
    BURIED = 2


Fates = Callable[[_Int64s, _Int64s], npt.NDArray[np.uint8]]
"""A function that takes the first hash and the address of each row, int64[rows] each. It returns the Fate of each row,
uint8[rows]."""

MAX_ORIGINS = 1000
"""The maximum number of origins that the catalog names per segment. Rows with an older origin count as written by the
oldest origin that is named."""


class Merge:
    """A merge of segments into rows of one schema.

    Args:
        segments: the segments, newest first.
        schema: the schema of the merged rows; the schema of each segment is the same or an earlier one of the view.
        fates: returns the Fate of each key's newest row; all of these rows are kept by default.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        schema: ViewSchema,
        *,
        fates: Fates | None = None,
    ) -> None:
        self.layout = RowLayout(schema)
        self._segments = segments
        self._fates = fates
        self._chunks, self._starts = chunk_table(segments)
        chunks = [chunk for segment in segments for chunk in segment.chunks]
        self._all_chunks = chunks
        self._cold = np.zeros((len(chunks), _COLD_COLUMNS), np.int64)
        for row, chunk in zip(self._cold, chunks, strict=True):
            row[_KEY_OFFSETS] = chunk.address + chunk.header.key_offsets
            row[_KEYS] = chunk.address + chunk.header.keys
            row[_KEYS_SIZE] = chunk.header.total - chunk.header.keys
            row[_ORIGINS] = chunk.address + chunk.header.origins if chunk.header.origins else 0
        self._program = np.array([segment.instructions(schema.features) for segment in segments], np.int64)
        widths = [width_of(feature.type) for feature in schema.features]
        self._fields = np.array([self.layout.offsets, widths], np.int64).T.copy()
        self.origins, self._origin_numbers = _joint_origins(segments)

    def chunks(self, chunk_bytes: int) -> Iterator[ChunkBuilder]:
        """Yield the merged rows in chunks of about `chunk_bytes`; yield nothing if no row is left."""
        records = [segment.record for segment in self._segments]
        rows = sum(record.rows + record.tombstones for record in records)
        row_bytes = max(self.layout.stride + 8, sum(record.bytes for record in records) // max(rows, 1))
        for low, high in self._ranges(max(1, chunk_bytes // row_bytes)):
            picked, chunk_of, buried = self._pick(low, high)
            if picked.size:
                yield self._copy(picked, chunk_of, buried)

    def _ranges(self, rows_per_chunk: int) -> Iterator[tuple[int, int]]:
        """Yield ranges of first hashes, both ends included, with about `rows_per_chunk` rows each."""
        largest = max(self._segments, key=lambda segment: segment.record.rows + segment.record.tombstones)
        bounds = sorted({int(hash_) for chunk in largest.chunks for hash_ in chunk.hashes[::rows_per_chunk]})
        lowest = -(2**63)
        highest = 2**63 - 1
        for low, after in zip([lowest, *bounds[1:]], [*bounds[1:], None], strict=True) if bounds else ():
            yield low, highest if after is None else after - 1

    def _pick(self, low: int, high: int) -> tuple[_Int64s, _Int64s, npt.NDArray[np.bool_]]:
        """Return the newest rows of a range of hashes, in order and without the rows that are left out.

        Returns:
            (the address of each row, the number of its chunk, whether the row is buried).
        """
        hashes = []
        addresses = []
        chunk_of = []
        ends = [0]
        for segment in range(len(self._segments)):
            for number in range(self._starts[segment], self._starts[segment + 1]):
                chunk = self._all_chunks[number]
                start = int(np.searchsorted(chunk.hashes, low))
                end = max(start, int(np.searchsorted(chunk.hashes, high, side="right")))
                hashes.append(chunk.hashes[start:end])
                rows = np.arange(start, end, dtype=np.int64)
                addresses.append(chunk.address + chunk.header.row_data + rows * chunk.header.stride)
                chunk_of.append(np.full(end - start, number, np.int64))
            ends.append(sum(part.size for part in hashes))
        address = np.concatenate(addresses)
        picked = np.empty(address.size, np.int64)
        first = np.concatenate(hashes)
        count = pick_newest(first, address, np.array(ends, np.int64), picked)
        picked = picked[:count]
        buried = np.zeros(count, np.bool_)
        if self._fates is not None:
            fates = self._fates(first[picked], address[picked])
            stays = fates != Fate.LEFT_OUT
            picked = picked[stays]
            buried = fates[stays] == Fate.BURIED
        return address[picked], np.concatenate(chunk_of)[picked], buried

    def _copy(self, address: _Int64s, chunk_of: _Int64s, buried: npt.NDArray[np.bool_]) -> ChunkBuilder:
        builder = ChunkBuilder(self.layout, address.size, with_origins=len(self.origins) > 1)
        for chunk_number in np.unique(chunk_of):
            chunk = self._all_chunks[chunk_number]
            mine = chunk_of == chunk_number
            rows = (address[mine] - (chunk.address + chunk.header.row_data)) // chunk.header.stride
            builder.hashes[mine] = chunk.hashes[rows]
        heap_bytes, key_bytes = measure_rows(address, chunk_of, buried, self._chunks, self._cold, self._program)
        if heap_bytes == MISFIT or np.any(builder.hashes[1:] < builder.hashes[:-1]):
            raise self._damaged()
        heap_before = builder.heap_size
        heap = builder.buffer.reserve(heap_bytes)
        keys = builder.keys.reserve(key_bytes)
        copy_rows(
            address,
            chunk_of,
            buried,
            self._chunks,
            self._cold,
            self._program,
            self._fields,
            builder.row_address,
            self.layout.stride,
            heap,
            heap_before,
            builder.key_offsets,
            keys,
        )
        if len(self.origins) > 1:
            copy_origins(address, chunk_of, self._chunks, self._cold, self._origin_numbers, builder.origins)
        return builder

    def _damaged(self) -> StoreDamaged:
        """Return the error for rows that cannot be merged; raise StoreDamaged if the verification finds a damaged
        chunk."""
        names = {segment.record.id for segment in self._segments}
        for chunk in self._all_chunks:
            chunk.verify()
        return StoreDamaged(f"segments {', '.join(sorted(names))} contain invalid rows; {LOAD_AGAIN}")


def _joint_origins(segments: Sequence[Segment]) -> tuple[tuple[Origin, ...], npt.NDArray[np.int64]]:
    """Return the origins of all segments, oldest first, and a table that renumbers the origins of each segment.

    The table maps [segment, position in the segment's origins] to the position among the joint origins.
    """
    distinct = {origin for segment in segments for origin in segment.record.origins}
    origins = sorted(distinct, key=lambda origin: origin.seq)[-MAX_ORIGINS:]
    number_of = {origin: number for number, origin in enumerate(origins)}
    most = max(len(segment.record.origins) for segment in segments)
    numbers = np.zeros((len(segments), most), np.int64)
    for row, segment in zip(numbers, segments, strict=True):
        row[: len(segment.record.origins)] = [number_of.get(origin, 0) for origin in segment.record.origins]
    return tuple(origins), numbers


@kernel
def pick_newest(hashes: Any, address: Any, ends: Any, picked: Any) -> int:
    """Merge runs of rows, and pick the newest row of each key.

    Each run is in ascending order of (first hash, second hash). If several runs have a key, the row in the first of
    these runs is the newest.

    Args:
        hashes, address: int64[rows], first hash and address of each row, run after run, newest run first.
        ends: int64[runs + 1], the position where each run begins, then the number of rows.
        picked: int64[rows], receives the positions of the newest rows, in order.

    Returns:
        The number of newest rows.
    """
    runs = ends.size - 1
    heads = ends[:runs].copy()
    count = 0
    while True:
        best = -1
        for run in range(runs):
            if heads[run] == ends[run + 1]:
                continue
            if best < 0 or _precedes(hashes, address, heads[run], heads[best]):
                best = run
        if best < 0:
            return count
        winner = heads[best]
        picked[count] = winner
        count += 1
        second = load_i64(address[winner] + ROW_SECOND_HASH)
        for run in range(best, runs):
            head = heads[run]
            same = head < ends[run + 1] and hashes[head] == hashes[winner]
            if same and load_i64(address[head] + ROW_SECOND_HASH) == second:
                heads[run] += 1


@njit(inline="always")
def _precedes(hashes: Any, address: Any, one: int, other: int) -> Any:
    if hashes[one] != hashes[other]:
        return hashes[one] < hashes[other]
    return load_i64(address[one] + ROW_SECOND_HASH) < load_i64(address[other] + ROW_SECOND_HASH)


@njit(inline="always")
def _key_bounds(row: int, chunk: int, chunks: Any, cold: Any) -> Any:
    """Return the begin and the end of a row's key within its chunk's keys, in bytes."""
    number = (row - chunks[chunk, finding.ROW_DATA]) // chunks[chunk, finding.STRIDE]
    offsets = cold[chunk, _KEY_OFFSETS] + 4 * number
    return load_u32(offsets), load_u32(offsets + 4)


@kernel
def measure_rows(address: Any, chunk_of: Any, buried: Any, chunks: Any, cold: Any, program: Any) -> Any:
    """Return the size of all values in the heap and of all keys, in bytes. Leave out buried rows: they keep neither.

    Return (MISFIT, 0) if a value or a key is not completely inside its chunk.
    """
    heap_bytes = 0
    key_bytes = 0
    for row in range(address.size):
        chunk = chunk_of[row]
        if buried[row]:
            continue
        start, end = _key_bounds(address[row], chunk, chunks, cold)
        if not start <= end <= cold[chunk, _KEYS_SIZE]:
            return MISFIT, 0
        key_bytes += end - start
        instructions = program[chunks[chunk, SEGMENT]]
        for feature in range(instructions.shape[0]):
            in_heap = instructions[feature, OPERATION] == HEAP_REFERENCE
            if in_heap and is_present(address[row], instructions[feature, PRESENCE_BIT]):
                reference = load_i64(address[row] + instructions[feature, OFFSET])
                length = length_in_heap(reference, chunks[chunk, HEAP_SIZE])
                if length == MISFIT:
                    return MISFIT, 0
                heap_bytes += length
    return heap_bytes, key_bytes


@kernel
def copy_rows(
    address: Any,
    chunk_of: Any,
    buried: Any,
    chunks: Any,
    cold: Any,
    program: Any,
    fields: Any,
    rows: int,
    stride: int,
    heap: int,
    heap_offset: int,
    key_offsets: Any,
    keys: int,
) -> None:
    """Copy rows, their variable-length values and their keys into a chunk.

    Args:
        address, chunk_of: int64[rows], the address and the chunk number of each row to copy, in order.
        buried: bool[rows], whether a published tombstone is written in place of the row.
        program: int64[segments, features, PROGRAM_COLUMNS], how each field is read.
        fields: int64[features, 2], each field's offset and width in the new layout.
        rows, stride: address of the first new row, and the stride of the new rows; all bytes of these rows must be
            zero.
        heap: address to write the variable-length values to; it is `heap_offset` bytes after the start of the chunk's
            heap.
        key_offsets: uint32[rows + 1], receives the position where each key begins.
        keys: address to write the keys to.
    """
    heap_used = 0
    keys_used = 0
    for row in range(address.size):
        source = address[row]
        chunk = chunk_of[row]
        target = rows + stride * row
        key_offsets[row + 1] = keys_used
        store_i64(target + ROW_SECOND_HASH, load_i64(source + ROW_SECOND_HASH))
        store_i64(target + ROW_EVENT_TIME, load_i64(source + ROW_EVENT_TIME))
        if buried[row]:
            store_u8(target + ROW_PRESENCE, TOMBSTONE)
            continue
        start, end = _key_bounds(source, chunk, chunks, cold)
        copy_bytes(keys + keys_used, cold[chunk, _KEYS] + start, end - start)
        keys_used += end - start
        key_offsets[row + 1] = keys_used
        store_u8(target + ROW_PRESENCE, load_u8(source + ROW_PRESENCE) & ROW_STATE)
        instructions = program[chunks[chunk, SEGMENT]]
        for feature in range(instructions.shape[0]):
            operation = instructions[feature, OPERATION]
            if operation == ABSENT or not is_present(source, instructions[feature, PRESENCE_BIT]):
                continue
            byte = target + ROW_PRESENCE + ((FIRST_FEATURE_BIT + feature) >> 3)
            store_u8(byte, load_u8(byte) | 1 << ((FIRST_FEATURE_BIT + feature) & 7))
            field = target + fields[feature, 0]
            value = source + instructions[feature, OFFSET]
            if operation != HEAP_REFERENCE:
                copy_field(operation, value, field, fields[feature, 1])
                continue
            reference = load_i64(value)
            size = reference & MAX_HEAP_VALUE
            copy_bytes(heap + heap_used, chunks[chunk, HEAP] + (reference >> HEAP_LENGTH_BITS), size)
            store_i64(field, (heap_offset + heap_used) << HEAP_LENGTH_BITS | size)
            heap_used += size


@kernel
def copy_origins(address: Any, chunk_of: Any, chunks: Any, cold: Any, numbers: Any, origins: Any) -> None:
    """Write each row's origin, renumbered by numbers[segment, origin], into origins[rows]."""
    for row in range(address.size):
        chunk = chunk_of[row]
        own = 0
        if cold[chunk, _ORIGINS]:
            number = (address[row] - chunks[chunk, finding.ROW_DATA]) // chunks[chunk, finding.STRIDE]
            place = cold[chunk, _ORIGINS] + 2 * number
            own = load_u8(place) | load_u8(place + 1) << 8
        origins[row] = numbers[chunks[chunk, SEGMENT], min(own, numbers.shape[1] - 1)]
