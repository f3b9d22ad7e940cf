"""Gather features of found rows into columns, and copy variable-length values out of the heap.

The rows of one column may come from segments of different layouts. So a program has one instruction per (segment,
feature): the position of the feature in the segment's rows, and the way to read the feature.
"""

from enum import IntEnum
from typing import Any

import numpy as np
from numba import njit

from shoal.engine.base.times import FIRST_TIME, LAST_TIME
from shoal.engine.format.layout import (
    HEAP_LENGTH_BITS,
    MAX_HEAP_VALUE,
    OWN_AGE,
    PUSHED,
    ROW_EVENT_TIME,
    ROW_PRESENCE,
    TOMBSTONE,
    is_own_age,
)
from shoal.engine.kernels.compiling import kernel
from shoal.engine.kernels.finding import HEAP, HEAP_SIZE, NOT_FOUND, SEGMENT
from shoal.engine.kernels.memory import (
    copy_bytes,
    float64_bits,
    load_f32,
    load_i32,
    load_i64,
    load_u8,
    store_i32,
    store_i64,
    store_u8,
)

# Columns of the program, int64[segments, features, PROGRAM_COLUMNS].
OPERATION = 0
OFFSET = 1
PRESENCE_BIT = 2
PROGRAM_COLUMNS = 3

# Columns of the table of output columns, int64[features, OUTPUT_COLUMNS].
WIDTH = 0
NULL_PATTERN = 1
OUTPUT_COLUMNS = 2

COLUMN_ALIGNMENT = 8
"""The alignment of a column in bytes. The body of an Arrow IPC message has the same alignment, so a column can be sent
without a copy."""


class Operation(IntEnum):
    """The way to read one feature from the rows of one segment."""

    ABSENT = 0
    COPY_1 = 1
    COPY_4 = 2
    COPY_8 = 3
    INT32_TO_INT64 = 4
    INT32_TO_FLOAT64 = 5
    FLOAT32_TO_FLOAT64 = 6
    COPY_INLINE = 7
    HEAP_REFERENCE = 8
    COPY_TIME = 9


class Status(IntEnum):
    """The outcome for one key, or for one value; the numbers are those of Feast's FieldStatus.

    A row is UNAVAILABLE if it is kept in a table and did not arrive in time; Feast calls this status INVALID.
    """

    UNAVAILABLE = 0
    PRESENT = 1
    NULL_VALUE = 2
    NOT_FOUND = 3
    OUTSIDE_MAX_AGE = 4


STATUSES = max(Status) + 1
"""The size of an array with one element for each Status."""

_PRESENT = int(Status.PRESENT)
_NOT_FOUND = int(Status.NOT_FOUND)
_OUTSIDE_MAX_AGE = int(Status.OUTSIDE_MAX_AGE)
ABSENT = int(Operation.ABSENT)
_COPY_1 = int(Operation.COPY_1)
_COPY_4 = int(Operation.COPY_4)
_COPY_8 = int(Operation.COPY_8)
_COPY_TIME = int(Operation.COPY_TIME)
_INT32_TO_INT64 = int(Operation.INT32_TO_INT64)
_INT32_TO_FLOAT64 = int(Operation.INT32_TO_FLOAT64)
_FLOAT32_TO_FLOAT64 = int(Operation.FLOAT32_TO_FLOAT64)
HEAP_REFERENCE = int(Operation.HEAP_REFERENCE)

NO_EVENT_TIME = np.iinfo(np.int64).min
"""The event time of a key without a row: NumPy's NaT."""

MISFIT = -1
"""The number that is returned as the length of an invalid value. A value is invalid if its reference leads out of the
heap, or if the lengths in the value do not add up."""


@njit(inline="always")
def length_in_heap(reference: int, heap_size: int) -> Any:
    """Return the size in bytes of the value at a heap reference, or MISFIT if the value is not entirely in the heap.

    The checksum is not verified when a row is read. Even if a bit of the row is flipped, a kernel must not read outside
    the chunk.
    """
    offset = reference >> HEAP_LENGTH_BITS
    length = reference & MAX_HEAP_VALUE
    return length if 0 <= offset <= heap_size - length else MISFIT


@njit(inline="always")
def in_range(time: int) -> Any:
    """Return a stored time, limited to the range of times in answers. Older versions of Shoal stored times outside this
    range."""
    return min(max(time, FIRST_TIME), LAST_TIME)


_is_own_age = njit(inline="always")(is_own_age)


@njit(inline="always")
def has_own_age(row: int) -> Any:
    """Return whether the age of the row at an address is computed only from the row's own event time (see
    `shoal.engine.format.layout.OWN_AGE`)."""
    return _is_own_age(load_i64(row + ROW_EVENT_TIME))


@njit(inline="always")
def event_time_of(row: int) -> Any:
    """Return the event time of the row at an address, in microseconds since 1970."""
    word = load_i64(row + ROW_EVENT_TIME)
    return word ^ OWN_AGE if _is_own_age(word) else word


@njit(inline="always")
def judge_row(
    address: Any, zero_row: int, oldest: int, low_watermark: int, serve_stale: bool, status: Any, event_time: Any
) -> Any:
    """Set the status of each key, from the age of its row. If a key has no row that may be served, use the zero row, in
    which all features are null.

    Args:
        address: int64[keys] as `find_block` left it. `zero_row` replaces NOT_FOUND, and the addresses of tombstones and
            of rows that are too old to be served.
        zero_row: address of a row of zeros at least as long as the longest stride.
        oldest: rows with an earlier event time (microseconds) are OUTSIDE_MAX_AGE.
        low_watermark: the event time (microseconds) that the sources of all published rows have reached, except the
            sources of rows with an age of their own; NO_EVENT_TIME if it is not known.
        serve_stale: whether the values of OUTSIDE_MAX_AGE rows are served.
        status: uint8[keys]: receives the Status.
        event_time: int64[keys]: receives the event time, or NO_EVENT_TIME if there is no row.

    Returns:
        The number of keys that are OUTSIDE_MAX_AGE.
    """
    stale = 0
    published_are_young = low_watermark >= oldest
    for key in range(address.size):
        row = address[key]
        if row == NOT_FOUND or load_u8(row + ROW_PRESENCE) & TOMBSTONE:
            status[key] = _NOT_FOUND
            event_time[key] = NO_EVENT_TIME
            address[key] = zero_row
            continue
        event_time[key] = in_range(event_time_of(row))
        status[key] = _PRESENT
        if event_time[key] < oldest and not (
            published_are_young and not has_own_age(row) and not load_u8(row + ROW_PRESENCE) & PUSHED
        ):
            status[key] = _OUTSIDE_MAX_AGE
            stale += 1
            if not serve_stale:
                address[key] = zero_row
    return stale


@njit(inline="always")
def is_present(row: int, bit: int) -> Any:
    return load_u8(row + ROW_PRESENCE + (bit >> 3)) >> (bit & 7) & 1 != 0


@njit(inline="always")
def copy_field(operation: int, source: int, destination: int, width: int) -> None:
    """Copy a value that is in the row itself, not in the heap. Widen the value if the operation says so. `width` is the
    size of the copy in bytes."""
    if operation == _COPY_4:
        store_i32(destination, load_i32(source))
    elif operation == _COPY_8:
        store_i64(destination, load_i64(source))
    elif operation == _COPY_TIME:
        store_i64(destination, in_range(load_i64(source)))
    elif operation == _COPY_1:
        store_u8(destination, load_u8(source))
    elif operation == _INT32_TO_INT64:
        store_i64(destination, load_i32(source))
    elif operation == _INT32_TO_FLOAT64:
        store_i64(destination, float64_bits(np.float64(load_i32(source))))
    elif operation == _FLOAT32_TO_FLOAT64:
        store_i64(destination, float64_bits(np.float64(load_f32(source))))
    else:
        copy_bytes(destination, source, width)


@kernel
def _gather_mixed(address: Any, chunk_of: Any, chunks: Any, instructions: Any, output: Any, to: int, valid: Any) -> int:
    """Gather one column's values. Choose the instruction for each row. Return the number of nulls."""
    nulls = 0
    width = output[WIDTH]
    for key in range(address.size):
        row = address[key]
        chunk = max(chunk_of[key], 0)
        instruction = instructions[chunks[chunk, SEGMENT]]
        operation = instruction[OPERATION]
        present = operation != ABSENT and is_present(row, instruction[PRESENCE_BIT])
        valid[key] = present
        destination = to + width * key
        if not present:
            nulls += 1
            _store_null(destination, width, output[NULL_PATTERN])
            continue
        source = row + instruction[OFFSET]
        if operation != HEAP_REFERENCE:
            copy_field(operation, source, destination, width)
        else:
            reference = load_i64(source)
            store_i64(destination, chunks[chunk, HEAP] + (reference >> HEAP_LENGTH_BITS))
            store_i64(destination + 8, length_in_heap(reference, chunks[chunk, HEAP_SIZE]))
    return nulls


@njit(inline="always")
def _store_null(destination: int, width: int, pattern: int) -> None:
    if width == 1:
        store_u8(destination, pattern)
    else:
        for position in range(0, width, 4):
            store_i32(destination + position, pattern >> (8 * (position & 4)))


@kernel
def _gather_words_4(address: Any, instruction: Any, null_pattern: int, to: int, valid: Any) -> int:
    """Do the same as `_gather_mixed` for rows of one layout and a feature of 4 bytes. This is the main case in
    ranking."""
    nulls = 0
    offset = instruction[OFFSET]
    byte = ROW_PRESENCE + (instruction[PRESENCE_BIT] >> 3)
    bit = instruction[PRESENCE_BIT] & 7
    for key in range(address.size):
        present = load_u8(address[key] + byte) >> bit & 1
        value = load_i32(address[key] + offset)
        store_i32(to + 4 * key, value if present else null_pattern)
        valid[key] = present
        nulls += 1 - present
    return nulls


@kernel
def _copy_words_4(address: Any, offset: int, to: int) -> None:
    """Do the same as `_gather_words_4` for values without nulls."""
    for key in range(address.size):
        store_i32(to + 4 * key, load_i32(address[key] + offset))


@njit(inline="always")
def has_all(row: int, presence: Any) -> Any:
    """Return whether a row has every feature of a presence mask, uint8[bytes]."""
    missing = 0
    for byte in range(presence.size):
        missing |= ~load_u8(row + ROW_PRESENCE + byte) & presence[byte]
    return missing == 0


@njit(inline="always")
def _all_have_all(address: Any, chunk_of: Any, chunks: Any, presence: Any) -> Any:
    complete = True
    for key in range(address.size):
        complete &= has_all(address[key], presence[chunks[max(chunk_of[key], 0), SEGMENT]])
    return complete


@njit(inline="always")
def place_columns(keys: int, outputs: Any, column_starts: Any) -> None:
    """Set column_starts[features] to the start of each column in the arena, in bytes; `outputs` is as in
    `gather_block`."""
    position = 0
    for feature in range(outputs.shape[0]):
        column_starts[feature] = position
        position += (outputs[feature, WIDTH] * keys + COLUMN_ALIGNMENT - 1) // COLUMN_ALIGNMENT * COLUMN_ALIGNMENT


@njit(inline="always")
def gather_block(
    address: Any,
    chunk_of: Any,
    start: int,
    chunks: Any,
    program: Any,
    presence: Any,
    same_layout: Any,
    outputs: Any,
    arena: int,
    column_starts: Any,
    valid: Any,
    nulls: Any,
) -> None:
    """For the keys of a block, gather every feature of the program into the feature's column.

    Args:
        address, chunk_of: int64[keys of the block] as `judge_row` left them.
        start: the number of the block's first key.
        chunks: the chunk table.
        program: int64[segments, features, PROGRAM_COLUMNS].
        presence: uint8[segments, bytes], a presence bitmap with the bits of all features.
        same_layout: bool[features], whether all segments have the feature at the same position and in the same form.
            This is true for segments of the same schema.
        outputs: int64[features, OUTPUT_COLUMNS]: bytes per value, and the bit pattern of a null.
        arena: address of the memory of all columns; each column begins at a multiple of COLUMN_ALIGNMENT bytes and has
            keys x width bytes. For a value in the heap, the column has 16 bytes: the value's address and its length.
        column_starts: int64[features], the start of each column in the arena, in bytes.
        valid: uint8[features, keys]: receives 1 where the value is not null.
        nulls: int64[features], the number of nulls; this call adds to it.
    """
    complete = _all_have_all(address, chunk_of, chunks, presence)
    for feature in range(outputs.shape[0]):
        target = arena + column_starts[feature] + outputs[feature, WIDTH] * start
        of_block = valid[feature, start : start + address.size]
        instruction = program[0, feature]
        if not same_layout[feature] or instruction[OPERATION] != _COPY_4:
            output = outputs[feature]
            nulls[feature] += _gather_mixed(address, chunk_of, chunks, program[:, feature], output, target, of_block)
        elif complete:
            _copy_words_4(address, instruction[OFFSET], target)
            of_block[:] = 1
        else:
            nulls[feature] += _gather_words_4(address, instruction, outputs[feature, NULL_PATTERN], target, of_block)


@kernel
def heap_offsets(references: int, valid: Any, offsets: Any, unit: int) -> int:
    """Write the byte offsets of the values of a gathered column of heap references to offsets[keys + 1]. A null value
    is empty.

    Args:
        unit: the size of an item in bytes, a power of two; the size of each value must be a multiple of the item size.

    Returns:
        The total size of all values in bytes, or MISFIT if a value is invalid.
    """
    total = 0
    for key in range(valid.size):
        offsets[key] = total
        if valid[key]:
            length = load_i64(references + 16 * key + 8)
            if length < 0 or length & (unit - 1):
                return MISFIT
            total += length
    offsets[valid.size] = total
    return total


@kernel
def copy_heap(references: int, offsets: Any, destination: int) -> None:
    """Copy the values of a gathered column of heap references to `destination`, at the offsets from `heap_offsets`."""
    for key in range(offsets.size - 1):
        size = offsets[key + 1] - offsets[key]
        if size:
            copy_bytes(destination + offsets[key], load_i64(references + 16 * key), size)


@kernel
def string_lists_fit(data: int, offsets: Any) -> bool:
    """Return whether copied list<string> values are valid. A valid value consists of the number of strings, the end of
    each string (uint32, ascending), and the bytes of all strings. The last end is the number of these bytes."""
    for key in range(offsets.size - 1):
        size = offsets[key + 1] - offsets[key]
        if size == 0:
            continue
        value = data + offsets[key]
        count = load_i32(value) if size >= 4 else MISFIT
        text_size = size - 4 - 4 * count
        if count < 0 or text_size < 0:
            return False
        end = 0
        for index in range(count):
            start = end
            end = load_i32(value + 4 + 4 * index)
            if end < start:
                return False
        if end != text_size:
            return False
    return True


@kernel
def string_list_sizes(data: int, offsets: Any, list_offsets: Any) -> int:
    """Write Arrow's list offsets for copied list<string> values to list_offsets[keys + 1]. An offset counts strings.
    Return the total size of all strings in bytes. A value consists of the number of strings, the end of each string
    (uint32), and the bytes of all strings."""
    strings = 0
    total = 0
    for key in range(offsets.size - 1):
        list_offsets[key] = strings
        size = offsets[key + 1] - offsets[key]
        if size:
            count = load_i32(data + offsets[key])
            strings += count
            total += size - 4 - 4 * count
    list_offsets[offsets.size - 1] = strings
    return total


@kernel
def copy_string_lists(data: int, offsets: Any, list_offsets: Any, string_offsets: Any, destination: int) -> None:
    """Copy the strings of list<string> values to `destination`, and write the strings' Arrow offsets to
    string_offsets[strings + 1]. `data` and `offsets` are as in `string_list_sizes`."""
    position = 0
    string = 0
    for key in range(offsets.size - 1):
        count = list_offsets[key + 1] - list_offsets[key]
        ends = data + offsets[key] + 4
        for index in range(count):
            string_offsets[string + index] = position + (load_i32(ends + 4 * index - 4) if index else 0)
        if count:
            size = load_i32(ends + 4 * (count - 1))
            copy_bytes(destination + position, ends + 4 * count, size)
            position += size
        string += count
    string_offsets[string] = position
