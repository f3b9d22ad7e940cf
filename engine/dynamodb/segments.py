"""Make segments in memory from rows of a table. The kernels treat such a segment like any other."""

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from shoal.engine.base.errors import ViewDamaged
from shoal.engine.dynamodb.items import ROW_AT, heap_fields, unpack_values
from shoal.engine.format.catalog import SegmentRecord
from shoal.engine.format.layout import ChunkHeader, RowLayout, most_buckets
from shoal.engine.format.schema import Feature, JoinKey, ViewSchema
from shoal.engine.kernels.memory import address_of
from shoal.engine.store.segment import Chunk, Segment


def segments_of(
    view: str, values: Sequence[bytes], schema_of: Callable[[bytes], ViewSchema], names: Sequence[bytes] | None = None
) -> list[Segment]:
    """Return rows as segments, one for each schema of the rows.

    Args:
        values: `v` of items (see `shoal.engine.dynamodb.items`), each with a different key.
        schema_of: a function that returns the schema with a given fingerprint.
        names: `n` of the same items, if keys will be read from the segments.

    Raises:
        ViewDamaged: a value is not a valid row.
    """
    by_schema: defaultdict[bytes, list[int]] = defaultdict(list)
    for number, value in enumerate(values):
        by_schema[value[:8]].append(number)
    segments = []
    for schema_id, numbers in by_schema.items():
        rows = [values[number] for number in numbers]
        own_names = [names[number] for number in numbers] if names is not None else None
        segments.append(_segment(view, schema_of(schema_id), rows, own_names))
    return segments


def warm() -> None:
    """Compile the kernels of this module. Otherwise they would be compiled at their first call."""
    schema = ViewSchema(
        name="v", join_keys=(JoinKey(name="k", type="int64"),), features=(Feature(name="f", type="string"),)
    )
    segments_of(schema.name, [bytes(ROW_AT + RowLayout(schema).stride)], lambda schema_id: schema)


def _segment(view: str, schema: ViewSchema, values: Sequence[bytes], names: Sequence[bytes] | None) -> Segment:
    count = len(values)
    stride = RowLayout(schema).stride
    starts = np.zeros(count + 1, np.int64)
    np.cumsum(np.fromiter(map(len, values), np.int64, count), out=starts[1:])
    if np.diff(starts).min() < ROW_AT + stride:
        raise _damaged(view)
    heap = b"".join(values)
    keys = np.frombuffer(b"".join(value[8:24] for value in values), np.int64).reshape(count, 2)
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    buckets = most_buckets(count)
    hashes_at = 0
    rows_at = 8 * count
    directory_at = rows_at + stride * count
    key_offsets_at = directory_at + 4 * (buckets + 1)
    heap_at = -(-(key_offsets_at + (4 * (count + 1) if names is not None else 0)) // 16) * 16
    heap_end = heap_at + len(heap)
    in_order = b"".join(names[number] for number in order.tolist()) if names is not None else b""
    memory = np.empty(heap_end + len(in_order), np.uint8)
    memory[heap_at:heap_end] = np.frombuffer(heap, np.uint8)
    if names is not None:
        memory[heap_end:] = np.frombuffer(in_order, np.uint8)
        key_ends = np.cumsum([0, *(len(names[number]) for number in order.tolist())], dtype=np.uint32)
        memory[key_offsets_at : key_offsets_at + key_ends.nbytes] = key_ends.view(np.uint8)
    at = address_of(memory)
    fields = heap_fields(schema)
    misfit = unpack_values(at + heap_at, starts, order, stride, fields, at + hashes_at, at + rows_at)
    if misfit >= 0:
        raise _damaged(view)
    hashes = memory[:rows_at].view(np.int64)
    shift, in_use = _fill_directory(hashes, memory[directory_at:key_offsets_at].view(np.uint32), buckets)
    header = ChunkHeader(
        stride=stride,
        rows=count,
        min_hash=int(hashes[0]),
        max_hash=int(hashes[-1]),
        shift=shift,
        buckets=in_use,
        hashes=hashes_at,
        row_data=rows_at,
        key_offsets=key_offsets_at,
        origins=0,
        directory=directory_at,
        heap=heap_at,
        keys=heap_end,
        total=memory.size,
        checksum=0,
    )
    # Set only the fields that reading and merging need, because this record is never written to a catalog.
    record = SegmentRecord.model_construct(
        id="table", view_schema=schema, origins=(), rows=count, tombstones=0, bytes=memory.size
    )
    return Segment(record, [Chunk.in_memory(header, memory, f"rows of view {view!r}")])


def _fill_directory(hashes: npt.NDArray[np.int64], directory: npt.NDArray[np.uint32], most: int) -> tuple[int, int]:
    """Write the directory of hashes; return its shift and its number of buckets."""
    span = int(hashes[-1]) - int(hashes[0])
    shift = max(0, (span // most).bit_length())
    buckets = (span >> shift) + 1
    of_hashes = (hashes - hashes[0]).view(np.uint64) >> np.uint64(shift)
    directory[: buckets + 1] = np.searchsorted(of_hashes, np.arange(buckets + 1, dtype=np.uint64))
    return shift, buckets


def _damaged(view: str) -> ViewDamaged:
    return ViewDamaged(f"view {view!r}: its table holds a value that is not a row; write it again with a new snapshot")
