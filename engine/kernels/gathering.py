"""Gather features of found rows into columns, and copy variable-length values out of the heap.

The rows of one column may come from segments of different layouts: a program, a table of one instruction per
(segment, feature), says where in its rows a segment has the feature and how to read it.
"""

from enum import IntEnum
from typing import Any

import numpy as np
from numba import njit

from engine.kernels.compiling import kernel
from engine.kernels.finding import HEAP, HEAP_SIZE, NOT_FOUND, SEGMENT
from engine.kernels.memory import (
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
from engine.layout import (
    HEAP_LENGTH_BITS,
    MAX_HEAP_VALUE,
    OWN_AGE,
    PUSHED,
    ROW_EVENT_TIME,
    ROW_PRESENCE,
    TOMBSTONE,
    is_own_age,
)
from engine.times import FIRST_TIME, LAST_TIME

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
"""As in the body of an Arrow IPC message, so that gathered columns can be sent as they are."""


class Operation(IntEnum):
    """How one feature is read from the rows of one segment."""

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
    """What became of one key, or of one value; the numbers are those of Feast's FieldStatus.

    A row is UNAVAILABLE if it is kept elsewhere and did not come in time; Feast calls that INVALID.
    """

    UNAVAILABLE = 0
    PRESENT = 1
    NULL_VALUE = 2
    NOT_FOUND = 3
    OUTSIDE_MAX_AGE = 4


STATUSES = max(Status) + 1
"""The size of an array with a place for each Status."""

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
"""Event time of a key that has no row: NumPy's NaT."""

MISFIT = -1
"""Where a length is expected: what is there is no value, since its reference or its own lengths lead out of it."""


@njit(inline="always")
def length_in_heap(reference: int, heap_size: int) -> Any:
    """The bytes of the value that a heap reference refers to, or MISFIT if they are not all in the heap.

    A row's checksum is not taken when it is read: a flipped bit in it must not lead out of the chunk.
    """
    offset, length = reference >> HEAP_LENGTH_BITS, reference & MAX_HEAP_VALUE
    return length if 0 <= offset <= heap_size - length else MISFIT


@njit(inline="always")
def in_range(time: int) -> Any:
    """A stored time, or the nearest in the range that answers hold: older versions stored times outside it."""
    return min(max(time, FIRST_TIME), LAST_TIME)


_is_own_age = njit(inline="always")(is_own_age)


@njit(inline="always")
def has_own_age(row: int) -> Any:
    """Whether the age of the row at an address counts from its own event time alone (see `engine.layout.OWN_AGE`)."""
    return _is_own_age(load_i64(row + ROW_EVENT_TIME))


@njit(inline="always")
def event_time_of(row: int) -> Any:
    """The event time of the row at an address, in microseconds since 1970."""
    word = load_i64(row + ROW_EVENT_TIME)
    return word ^ OWN_AGE if _is_own_age(word) else word


@njit(inline="always")
def judge(
    address: Any, zero_row: int, oldest: int, low_watermark: int, serve_stale: bool, status: Any, event_time: Any
) -> Any:
    """Judge each found row, and send keys that have nothing to serve to the zero row, where every feature is null.

    Args:
        address: int64[keys] as `find_block` left it; NOT_FOUND, tombstones and rows too old become `zero_row`.
        zero_row: address of a row of zeros at least as long as the longest stride.
        oldest: rows with an earlier event time (microseconds) are OUTSIDE_MAX_AGE.
        low_watermark: the event time (microseconds) that the source of every published row has reached, except of rows
            with an age of their own; NO_EVENT_TIME if it is not known.
        serve_stale: whether their values are served all the same.
        status: uint8[keys], becomes the Status.
        event_time: int64[keys], becomes the event time, or NO_EVENT_TIME where there is no row.

    Returns:
        How many keys are OUTSIDE_MAX_AGE.
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
    """Copy a value that lies in the row itself, widening it if the operation says so; `width` is that of the copy."""
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
    """Gather one column's keys, choosing the instruction row by row; returns how many are null."""
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
    """`_gather_mixed` for rows of one layout and a feature of 4 bytes, the case that ranking lives on."""
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
    """`_gather_words_4` where no value is null."""
    for key in range(address.size):
        store_i32(to + 4 * key, load_i32(address[key] + offset))


@njit(inline="always")
def has_all(row: int, presence: Any) -> Any:
    """Whether a row has every feature of which the presence mask, uint8[bytes], has a bit."""
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
def place_columns(keys: int, outputs: Any, at: Any) -> None:
    """Find where in the arena each column begins: at[features], from `outputs` as in `gather_block`."""
    position = 0
    for feature in range(outputs.shape[0]):
        at[feature] = position
        position += (outputs[feature, WIDTH] * keys + COLUMN_ALIGNMENT - 1) // COLUMN_ALIGNMENT * COLUMN_ALIGNMENT


@njit(inline="always")
def gather_block(
    address: Any,
    chunk_of: Any,
    start: int,
    chunks: Any,
    program: Any,
    presence: Any,
    alike: Any,
    outputs: Any,
    arena: int,
    at: Any,
    valid: Any,
    nulls: Any,
) -> None:
    """Gather every feature of the program, for the keys of a block, into its column.

    Args:
        address, chunk_of: int64[keys of the block] as `judge` left them.
        start: the number of the block's first key.
        chunks: the chunk table.
        program: int64[segments, features, PROGRAM_COLUMNS].
        presence: uint8[segments, bytes], a presence bitmap with the bits of all features.
        alike: bool[features], whether all segments have a feature in the same place and form, as those of one schema
            have.
        outputs: int64[features, OUTPUT_COLUMNS]: bytes per value, and the bit pattern that stands for null.
        arena: address of the memory of all columns; each begins at a multiple of COLUMN_ALIGNMENT bytes and has
            keys x width bytes. A value in the heap takes 16: its address and its length.
        at: int64[features], where in the arena each column begins.
        valid: uint8[features, keys], becomes 1 where the value is not null.
        nulls: int64[features], counts the nulls.
    """
    complete = _all_have_all(address, chunk_of, chunks, presence)
    for feature in range(outputs.shape[0]):
        to = arena + at[feature] + outputs[feature, WIDTH] * start
        of_block = valid[feature, start : start + address.size]
        instruction = program[0, feature]
        if not alike[feature] or instruction[OPERATION] != _COPY_4:
            output = outputs[feature]
            nulls[feature] += _gather_mixed(address, chunk_of, chunks, program[:, feature], output, to, of_block)
        elif complete:
            _copy_words_4(address, instruction[OFFSET], to)
            of_block[:] = 1
        else:
            nulls[feature] += _gather_words_4(address, instruction, outputs[feature, NULL_PATTERN], to, of_block)


@kernel
def heap_offsets(references: int, valid: Any, offsets: Any, unit: int) -> int:
    """Turn a gathered column of heap references into byte offsets, offsets[keys + 1]; null values are empty.

    Args:
        unit: the bytes of an item of a value, a power of two, of which each value has a whole number.

    Returns:
        The bytes of all values together, or MISFIT if one of them is.
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
    """Copy the values of a gathered column of heap references to `destination`, as `heap_offsets` laid them out."""
    for key in range(offsets.size - 1):
        size = offsets[key + 1] - offsets[key]
        if size:
            copy_bytes(destination + offsets[key], load_i64(references + 16 * key), size)


@kernel
def string_lists_fit(data: int, offsets: Any) -> bool:
    """Whether copied list<string> values are such: count, then each string's end, ascending, as uint32, then as many
    bytes as the last of them says."""
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
            start, end = end, load_i32(value + 4 + 4 * index)
            if end < start:
                return False
        if end != text_size:
            return False
    return True


@kernel
def string_list_sizes(data: int, offsets: Any, list_offsets: Any) -> int:
    """Turn copied list<string> values (count, then each string's end, as uint32, then the bytes) into offsets of
    lists, list_offsets[keys + 1], counted in strings. Returns the bytes of all strings together."""
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
    """Copy the strings of copied list<string> values, with string_offsets[strings + 1] as Arrow wants them."""
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
