"""Encode published rows (an Arrow record batch) into the rows, heap and keys of a chunk.

Arrow stores values by column, a segment stores them by row. So the kernel goes over all columns once per block of rows.
A block is small enough that its rows stay in the CPU cache.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from numba import njit

from shoal.engine.format.keys import KEY_HASH, KEY_HASH_2
from shoal.engine.format.layout import (
    FIRST_FEATURE_BIT,
    HEAP_LENGTH_BITS,
    MAX_HEAP_VALUE,
    OWN_AGE,
    PUSHED,
    ROW_EVENT_TIME,
    ROW_PRESENCE,
    ROW_SECOND_HASH,
    TOMBSTONE_BIT,
    ValueStorage,
    storage_of,
    width_of,
)
from shoal.engine.format.schema import ViewSchema, arrow_type, embedding_size
from shoal.engine.kernels.compiling import kernel
from shoal.engine.kernels.memory import (
    copy_bytes,
    load_i32,
    load_i64,
    load_u8,
    store_i32,
    store_i64,
    store_u8,
)
from shoal.engine.root.manifest import EVENT_TIMESTAMP, TOMBSTONE
from shoal.loaders.segments.segment_writer import ChunkBuilder

# The columns of the table `sources`, int64[features, SOURCE_COLUMNS]. The table has one row per column of the source.
STORAGE = 0
WIDTH = 1
VALUES = 2
VALIDITY = 3
SLICE = 4
OFFSETS = 5
STRING_OFFSETS = 6
FIELD = 7
PRESENCE_BIT = 8
ITEM_WIDTH = 9
SOURCE_COLUMNS = 10

_BYTE = int(ValueStorage.BYTE)
_WORD_4 = int(ValueStorage.WORD_4)
_WORD_8 = int(ValueStorage.WORD_8)
_INLINE = int(ValueStorage.INLINE)
_TOMBSTONE = 1 << TOMBSTONE_BIT
_BLOCK = 128


def published_schema(schema: ViewSchema, *, delta: bool) -> pa.Schema:
    """Return the columns of a view's published files in the types that `encode` takes.

    An embedding is a list of any length in this schema; `encode` checks the length.
    """
    fields = [
        pa.field(KEY_HASH, pa.int64()),
        pa.field(KEY_HASH_2, pa.int64()),
        pa.field(EVENT_TIMESTAMP, pa.timestamp("us", tz="UTC")),
    ]
    if delta:
        fields.append(pa.field(TOMBSTONE, pa.bool_()))
    fields += [pa.field(key.name, arrow_type(key.type)) for key in schema.join_keys]
    for feature in schema.features:
        in_files = pa.list_(pa.float32()) if embedding_size(feature.type) else arrow_type(feature.type)
        fields.append(pa.field(feature.name, in_files))
    return pa.schema(fields)


def encode(
    builder: ChunkBuilder,
    start: int,
    batch: pa.RecordBatch,
    *,
    pushed: bool = False,
    own_age: npt.NDArray[np.bool_] | None = None,
) -> None:
    """Write a batch with the columns of `published_schema` into the builder's rows, beginning at row `start`.

    Args:
        pushed: whether the rows are marked as pushed.
        own_age: bool[rows], whether the age of each row counts only from the row's own event time. None means false for
            all rows.

    Raises:
        ValueError: a value is longer than MAX_HEAP_VALUE, a list contains a null, or the length of an embedding differs
            from its type. The message names the feature, except for a null in a list.
    """
    layout = builder.layout
    end = start + batch.num_rows
    builder.hashes[start:end] = _integers(batch.column(KEY_HASH))
    _encode_keys(builder, start, batch)
    sources = np.zeros((len(layout.schema.features), SOURCE_COLUMNS), np.int64)
    kept_alive = []
    heap_bytes = 0
    for index, feature in enumerate(layout.schema.features):
        column = _with_byte_booleans(batch.column(feature.name))
        kept_alive.append(column)
        _describe(column, feature.type, sources[index])
        sources[index, FIELD] = layout.offsets[index]
        sources[index, PRESENCE_BIT] = FIRST_FEATURE_BIT + index
        if storage_of(feature.type) is ValueStorage.HEAP:
            heap_bytes += _heap_bytes(column)
    used_before = builder.heap_size
    heap = builder.buffer.reserve(heap_bytes)
    misfit, heap_used = encode_rows(
        builder.row_address + layout.stride * start,
        layout.stride,
        _integers(batch.column(KEY_HASH_2)),
        _event_time_words(batch, own_age),
        _states(batch, pushed),
        sources,
        heap,
        used_before,
    )
    if misfit >= 0:
        feature = layout.schema.features[misfit]
        raise ValueError(
            f"feature {feature.name!r} has a value that does not fit its type {feature.type}: it is longer than "
            f"{MAX_HEAP_VALUE} bytes, or it is an embedding of another length"
        )
    builder.buffer.size -= heap_bytes - heap_used


def _integers(column: pa.Array) -> npt.NDArray[np.int64]:
    """Return an int64 or timestamp column without nulls as int64[rows]."""
    values: npt.NDArray[np.int64] = np.frombuffer(column.buffers()[1], np.int64)
    return values[column.offset : column.offset + len(column)]


def _event_time_words(batch: pa.RecordBatch, own_age: npt.NDArray[np.bool_] | None) -> npt.NDArray[np.int64]:
    """Return the event times in their stored form, int64[rows] (see `shoal.engine.format.layout.OWN_AGE`)."""
    event_time = _integers(batch.column(EVENT_TIMESTAMP))
    return event_time if own_age is None else np.where(own_age, event_time ^ OWN_AGE, event_time)


def _states(batch: pa.RecordBatch, pushed: bool) -> npt.NDArray[np.uint8]:
    """Return the first byte of each row's presence bitmap, uint8[rows], before the bit of any feature is set."""
    states = np.full(batch.num_rows, PUSHED if pushed else 0, np.uint8)
    if TOMBSTONE in batch.schema.names:
        flags: npt.NDArray[np.bool_] = batch.column(TOMBSTONE).to_numpy(zero_copy_only=False)
        states |= flags.view(np.uint8) << TOMBSTONE_BIT
    return states


def _encode_keys(builder: ChunkBuilder, start: int, batch: pa.RecordBatch) -> None:
    keys = [batch.column(key.name) for key in builder.layout.schema.join_keys]
    sources = np.zeros((len(keys), SOURCE_COLUMNS), np.int64)
    size = 0
    for index, (column, key) in enumerate(zip(keys, builder.layout.schema.join_keys, strict=True)):
        _describe(column, key.type, sources[index])
        size += 8 * len(column) if key.type == "int64" else 4 * len(column) + _heap_bytes(column)
    position = builder.keys.size
    address = builder.keys.reserve(size)
    offsets = builder.key_offsets[start : start + batch.num_rows + 1]
    builder.keys.size = encode_keys(sources, offsets, address, position)


def _with_byte_booleans(column: pa.Array) -> pa.Array:
    return column.cast(pa.uint8()) if pa.types.is_boolean(column.type) else column


def _describe(column: pa.Array, column_type: str, source: npt.NDArray[np.int64]) -> None:
    """Write the storage, the width and the buffer addresses of a column into `source`, the column's row in
    `sources`."""
    storage = storage_of(column_type)
    buffers = column.buffers()
    source[STORAGE] = storage
    source[WIDTH] = width_of(column_type)
    source[SLICE] = column.offset
    source[VALIDITY] = buffers[0].address if column.null_count else 0
    if storage not in (ValueStorage.INLINE, ValueStorage.HEAP):
        source[VALUES] = buffers[1].address if buffers[1] else 0
        return
    source[OFFSETS] = buffers[1].address
    if not pa.types.is_list(column.type):
        source[VALUES] = buffers[2].address if buffers[2] else 0
        source[ITEM_WIDTH] = 1
        return
    items = column.values
    # Do not check the items under a null list: they belong to no value. In a fixed-size list, such items are nulls.
    if items.null_count and column.flatten().null_count:
        raise ValueError("a list feature holds a null item; drop such items, or the whole list, at the source")
    if pa.types.is_string(items.type):
        source[STRING_OFFSETS] = items.buffers()[1].address + 4 * items.offset
        source[VALUES] = items.buffers()[2].address if items.buffers()[2] else 0
        return
    source[ITEM_WIDTH] = items.type.bit_width // 8
    source[VALUES] = items.buffers()[1].address + source[ITEM_WIDTH] * items.offset if items.buffers()[1] else 0


def _heap_bytes(column: pa.Array) -> int:
    """Return the maximum number of bytes that a column's values can take in the heap."""
    if not len(column):
        return 0
    offsets = np.frombuffer(column.buffers()[1], np.int32)[column.offset : column.offset + len(column) + 1]
    first = int(offsets[0])
    last = int(offsets[-1])
    if not pa.types.is_list(column.type):
        return last - first
    items = column.values
    if pa.types.is_string(items.type):
        return 4 * len(column) + 4 * (last - first) + _heap_bytes(items.slice(first, last - first))
    return int(items.type.bit_width // 8) * (last - first)


@njit(inline="always")
def _is_valid(source: Any, row: int) -> Any:
    if source[VALIDITY] == 0:
        return True
    position = row + source[SLICE]
    return load_u8(source[VALIDITY] + (position >> 3)) >> (position & 7) & 1 != 0


@kernel
def _encode_string_list(source: Any, start: int, count: int, to: int) -> Any:
    """Write a list<string> value: its count and the end of each string (uint32 each), then the bytes of the strings.

    Return the size of the value in bytes.
    """
    base = load_i32(source[STRING_OFFSETS] + 4 * start)
    store_i32(to, count)
    for index in range(count):
        store_i32(to + 4 + 4 * index, load_i32(source[STRING_OFFSETS] + 4 * (start + index + 1)) - base)
    size = load_i32(source[STRING_OFFSETS] + 4 * (start + count)) - base
    copy_bytes(to + 4 + 4 * count, source[VALUES] + base, size)
    return 4 + 4 * count + size


@kernel
def _copy_words(row: int, stride: int, count: int, byte: int, mask: int, field: int, values: int) -> None:
    """Write a feature of 4 bytes into `count` rows that all have a value for it.

    A separate loop makes this usual case twice as fast.
    """
    for number in range(count):
        store_u8(row + byte, load_u8(row + byte) | mask)
        store_i32(row + field, load_i32(values + 4 * number))
        row += stride


@kernel
def encode_rows(
    rows: int, stride: int, second: Any, event_time: Any, states: Any, sources: Any, heap: int, heap_offset: int
) -> Any:
    """Write rows from columns.

    Args:
        rows: address of the first row; all bytes of the rows must be zero.
        second, event_time, states: int64, int64 and uint8[rows].
        sources: int64[features, SOURCE_COLUMNS].
        heap: address to write the variable-length values to; it is `heap_offset` bytes after the start of the chunk's
            heap.

    Returns:
        (index of the first feature with a value that does not fit, or -1; bytes of heap used).
    """
    used = 0
    for block in range(0, second.size, _BLOCK):
        block_end = min(block + _BLOCK, second.size)
        for row in range(block, block_end):
            store_i64(rows + stride * row + ROW_SECOND_HASH, second[row])
            store_i64(rows + stride * row + ROW_EVENT_TIME, event_time[row])
            store_u8(rows + stride * row + ROW_PRESENCE, states[row])
        all_alive = not (states[block:block_end] & _TOMBSTONE).any()
        for feature in range(sources.shape[0]):
            source = sources[feature]
            storage = source[STORAGE]
            byte = ROW_PRESENCE + (source[PRESENCE_BIT] >> 3)
            mask = 1 << (source[PRESENCE_BIT] & 7)
            if storage == _WORD_4 and source[VALIDITY] == 0 and all_alive:
                values = source[VALUES] + 4 * (source[SLICE] + block)
                _copy_words(rows + stride * block, stride, block_end - block, byte, mask, source[FIELD], values)
                continue
            for row in range(block, block_end):
                if states[row] & _TOMBSTONE or not _is_valid(source, row):
                    continue
                address = rows + stride * row
                store_u8(address + byte, load_u8(address + byte) | mask)
                field = address + source[FIELD]
                item = row + source[SLICE]
                if storage == _WORD_4:
                    store_i32(field, load_i32(source[VALUES] + 4 * item))
                elif storage == _WORD_8:
                    store_i64(field, load_i64(source[VALUES] + 8 * item))
                elif storage == _BYTE:
                    store_u8(field, load_u8(source[VALUES] + item))
                else:
                    start = load_i32(source[OFFSETS] + 4 * item)
                    count = load_i32(source[OFFSETS] + 4 * item + 4) - start
                    if storage == _INLINE:
                        if 4 * count != source[WIDTH]:
                            return feature, used
                        copy_bytes(field, source[VALUES] + 4 * start, 4 * count)
                        continue
                    if source[STRING_OFFSETS]:
                        size = _encode_string_list(source, start, count, heap + used)
                    else:
                        size = source[ITEM_WIDTH] * count
                        copy_bytes(heap + used, source[VALUES] + source[ITEM_WIDTH] * start, size)
                    if size > MAX_HEAP_VALUE:
                        return feature, used
                    store_i64(field, (heap_offset + used) << HEAP_LENGTH_BITS | size)
                    used += size
    return -1, used


@kernel
def encode_keys(sources: Any, offsets: Any, keys: int, position: int) -> int:
    """Write the keys one after the other at the address `keys`, and the end of each key into offsets[rows + 1].

    `keys` is `position` bytes after the start of the chunk's keys. A row without a key (a tombstone) takes no bytes.
    Return the end of the last key.
    """
    written = 0
    for row in range(offsets.size - 1):
        for column in range(sources.shape[0]):
            source = sources[column]
            if not _is_valid(source, row):
                continue
            item = row + source[SLICE]
            if source[STORAGE] == _WORD_8:
                store_i64(keys + written, load_i64(source[VALUES] + 8 * item))
                written += 8
            else:
                start = load_i32(source[OFFSETS] + 4 * item)
                size = load_i32(source[OFFSETS] + 4 * item + 4) - start
                store_i32(keys + written, size)
                copy_bytes(keys + written + 4, source[VALUES] + start, size)
                written += 4 + size
        offsets[row + 1] = position + written
    return position + written
