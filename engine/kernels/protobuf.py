"""Write gathered columns and event times as Protocol Buffers fields, directly from the gathered memory, and read the
keys of a request.

A column is a repeated field with the number 1, and each item is Feast's message `Value`. A `Value` is a oneof: the
field that is set gives the type. For an absent value, no field is set. Source: Protocol Buffers, "Encoding".
"""

from enum import IntEnum
from typing import Any

import numpy as np
from numba import njit

from shoal.engine.kernels.compiling import kernel
from shoal.engine.kernels.gathering import NO_EVENT_TIME
from shoal.engine.kernels.memory import (
    copy_bytes,
    data_of,
    load_i32,
    load_i64,
    load_u8,
    store_i32,
    store_i64,
    store_u8,
)

# Columns of the table of fields, int64[features, FIELD_COLUMNS].
FIELD = 0
ITEMS = 1
FIELD_COLUMNS = 2


class Field(IntEnum):
    """The field of a `Value` that contains a value of a column. The numbers are Feast's."""

    BYTES = 1
    STRING = 2
    INT32 = 3
    INT64 = 4
    DOUBLE = 5
    FLOAT = 6
    BOOL = 7
    UNIX_TIMESTAMP = 8
    STRING_LIST = 12
    INT64_LIST = 14
    FLOAT_LIST = 16


ELSEWHERE = 0
"""In the table of fields, this number marks a column of variable width, which `write_columns` does not write."""

MAX_TIMESTAMP = 2 + 11 + 6
"""The maximum size of an event time in bytes."""
OVERWRITTEN = 8
"""The number of bytes after the end of its output that a kernel may overwrite."""

_MAX_VARINT = 10
_MAX_SIZE = 5
_MAX_HEAD = 1 + _MAX_SIZE + 2 + _MAX_SIZE + 1 + _MAX_SIZE

_STRING = int(Field.STRING)
_INT32 = int(Field.INT32)
_INT64 = int(Field.INT64)
_DOUBLE = int(Field.DOUBLE)
_FLOAT = int(Field.FLOAT)
_BOOL = int(Field.BOOL)
_STRING_LIST = int(Field.STRING_LIST)
_INT64_LIST = int(Field.INT64_LIST)
_FLOAT_LIST = int(Field.FLOAT_LIST)

_VARINT, _FIXED_64, _SIZED, _FIXED_32 = 0, 1, 2, 5
_FIRST = 1 << 3 | _SIZED
_FIRST_VARINT = 1 << 3 | _VARINT
_SECOND_VARINT = 2 << 3 | _VARINT
_THIRD = 3 << 3 | _SIZED
_FLOAT_HEAD = _FIRST | 5 << 8 | (_FLOAT << 3 | _FIXED_32) << 16
_DOUBLE_HEAD = _FIRST | 9 << 8 | (_DOUBLE << 3 | _FIXED_64) << 16
_SECOND = 1_000_000


def most_bytes(items: int) -> int:
    """Return the maximum size of a value of fixed width in bytes; `items` is the length of an embedding, or 1."""
    return max(_MAX_HEAD + 4 * items, 2 + 1 + _MAX_VARINT)


def most_bytes_of_heap(field: Field, keys: int, size: int) -> int:
    """Return the maximum size in bytes of a column of variable-length values; `size` is their total stored size."""
    # Only two kinds of items can grow. An int64 in a list is stored in 8 bytes and written in up to 10. A string in a
    # list is stored with an end of 4 bytes, but written with a tag and a size of up to 6 bytes together.
    growth = 2 if field in (Field.INT64_LIST, Field.STRING_LIST) else 1
    return _MAX_HEAD * keys + growth * size


@njit(inline="always")
def _varint_size(number: int) -> Any:
    size = 1
    bits = np.uint64(number) >> np.uint64(7)
    while bits:
        size += 1
        bits >>= np.uint64(7)
    return size


@njit(inline="always")
def _write_varint(to: int, number: int) -> Any:
    bits = np.uint64(number)
    while bits >= np.uint64(0x80):
        store_u8(to, np.int64(bits & np.uint64(0x7F) | np.uint64(0x80)))
        to += 1
        bits >>= np.uint64(7)
    store_u8(to, np.int64(bits))
    return to + 1


@njit(inline="always")
def _open(to: int, tag: int, size: int) -> Any:
    """Write the tag and the size of a field. The caller then writes the content, which has `size` bytes."""
    return _write_varint(_write_varint(to, tag), size)


@njit(inline="always")
def _sized(size: int) -> Any:
    """Return the size in bytes of a field with a tag of one byte and `size` bytes of content."""
    return 1 + _varint_size(size) + size


@njit(inline="always")
def _open_value(to: int, field: int, size: int) -> Any:
    """Write the beginning of a `Value` with one field. The caller then writes the content of the field, which has
    `size` bytes."""
    tag = field << 3 | _SIZED
    to = _open(to, _FIRST, _varint_size(tag) + _varint_size(size) + size)
    return _open(to, tag, size)


@njit(inline="always")
def _open_floats(to: int, size: int) -> Any:
    """Write the beginning of a `Value` with a list of float32. The caller then writes the numbers, which have `size`
    bytes."""
    if size == 0:
        return _open_value(to, _FLOAT_LIST, 0)
    return _open(_open_value(to, _FLOAT_LIST, _sized(size)), _FIRST, size)


@njit(inline="always")
def _write_nothing(to: int) -> Any:
    """Write a `Value` without a field."""
    store_u8(to, _FIRST)
    store_u8(to + 1, 0)
    return to + 2


@njit(inline="always")
def _write_value(to: int, field: int, items: int, source: int) -> Any:
    """Write a `Value` of fixed width."""
    if field == _FLOAT:
        # The head and the number together have seven bytes, so one store is enough.
        store_i64(to, _FLOAT_HEAD | load_i32(source) << 24)
        return to + 7
    if field == _DOUBLE:
        store_i32(to, _DOUBLE_HEAD)
        store_i64(to + 3, load_i64(source))
        return to + 11
    if field == _FLOAT_LIST:
        to = _open_floats(to, 4 * items)
        copy_bytes(to, source, 4 * items)
        return to + 4 * items
    if field == _INT64:
        number = load_i64(source)
    elif field == _INT32:
        number = load_i32(source)
    elif field == _BOOL:
        number = load_u8(source)
    else:
        number = load_i64(source) // _SECOND
    store_u8(to, _FIRST)
    end = _write_varint(_write_varint(to + 2, field << 3 | _VARINT), number)
    store_u8(to + 1, end - to - 2)
    return end


@njit(inline="always")
def _width(field: int, items: int) -> Any:
    if field == _BOOL:
        return 1
    return 4 * items if field in (_FLOAT, _INT32, _FLOAT_LIST) else 8


@kernel
def write_columns(fields: Any, arena: Any, column_starts: Any, valid: Any, out: Any, ends: Any) -> None:
    """Write the columns of fixed width, each as one `Value` per key.

    Args:
        fields: int64[features, FIELD_COLUMNS]: the Field of each column, or ELSEWHERE, and the number of items in a
            value.
        arena, column_starts, valid: as `shoal.engine.kernels.answering.answer_columns` left them.
        out: uint8[bytes]: receives the columns, one after the other.
        ends: int64[features]: receives the end of each column in `out`; an ELSEWHERE column adds no bytes.
    """
    to = data_of(out)
    for feature in range(fields.shape[0]):
        field = fields[feature, FIELD]
        items = fields[feature, ITEMS]
        if field != ELSEWHERE:
            source = data_of(arena) + column_starts[feature]
            width = _width(field, items)
            for key in range(valid.shape[1]):
                there = valid[feature, key]
                to = _write_value(to, field, items, source + width * key) if there else _write_nothing(to)
        ends[feature] = to - data_of(out)


@njit(inline="always")
def _write_integers(to: int, source: int, count: int) -> Any:
    """Write a `Value` with a list of int64."""
    size = 0
    for index in range(count):
        size += _varint_size(load_i64(source + 8 * index))
    if size == 0:
        return _open_value(to, _INT64_LIST, 0)
    to = _open(_open_value(to, _INT64_LIST, _sized(size)), _FIRST, size)
    for index in range(count):
        to = _write_varint(to, load_i64(source + 8 * index))
    return to


@njit(inline="always")
def _write_strings(to: int, source: int) -> Any:
    """Write a `Value` with a list of strings. At `source` are the number of strings, the end of each string, and the
    bytes of all strings."""
    count = load_i32(source)
    ends = source + 4
    text = ends + 4 * count
    size, start = 0, 0
    for index in range(count):
        end = load_i32(ends + 4 * index)
        size += _sized(end - start)
        start = end
    to = _open_value(to, _STRING_LIST, size)
    start = 0
    for index in range(count):
        end = load_i32(ends + 4 * index)
        to = _open(to, _FIRST, end - start)
        copy_bytes(to, text + start, end - start)
        to += end - start
        start = end
    return to


@kernel
def write_heap(field: int, data: Any, offsets: Any, valid: Any, out: Any) -> int:
    """Write one column of variable-length values into `out`, uint8[bytes]; return the written size in bytes. Value i is
    data[offsets[i]:offsets[i + 1]]."""
    to = data_of(out)
    for key in range(valid.size):
        source = data_of(data) + offsets[key]
        size = np.int64(offsets[key + 1]) - offsets[key]
        if not valid[key]:
            to = _write_nothing(to)
        elif field == _INT64_LIST:
            to = _write_integers(to, source, size // 8)
        elif field == _STRING_LIST and size:
            to = _write_strings(to, source)
        else:
            to = _open_floats(to, size) if field == _FLOAT_LIST else _open_value(to, field, size)
            copy_bytes(to, source, size)
            to += size
    return int(to - data_of(out))


@kernel
def write_event_times(event_time: Any, out: Any) -> int:
    """Write event times, int64[keys] microseconds since 1970, as a repeated field with the number 3, of type
    `Timestamp`. Return the written size in bytes. NO_EVENT_TIME is written as 1970, which is an empty `Timestamp`."""
    to = data_of(out)
    for key in range(event_time.size):
        time = event_time[key]
        if time == NO_EVENT_TIME:
            time = 0
        seconds = time // _SECOND
        nanoseconds = (time - seconds * _SECOND) * 1000
        start = to
        store_u8(to, _THIRD)
        to += 2
        if seconds:
            store_u8(to, _FIRST_VARINT)
            to = _write_varint(to + 1, seconds)
        if nanoseconds:
            store_u8(to, _SECOND_VARINT)
            to = _write_varint(to + 1, nanoseconds)
        store_u8(start + 1, to - start - 2)
    return int(to - data_of(out))


@njit(inline="always")
def _read_varint(position: int, end: int) -> Any:
    """Return a number and its end address, which is after `end` if the number is not complete."""
    number = np.uint64(0)
    shift = np.uint64(0)
    while position < end and shift < np.uint64(64):
        byte = np.uint64(load_u8(position))
        position += 1
        number |= (byte & np.uint64(0x7F)) << shift
        if byte < np.uint64(0x80):
            return np.int64(number), position
        shift += np.uint64(7)
    return np.int64(0), end + 1


@njit(inline="always")
def _read_key(position: int, end: int, kind: int) -> Any:
    """Return the start and the end of the content of the `Value` at an address; the start is -1 if the `Value` is not
    exactly one field with the tag `kind`."""
    if load_u8(position) != _FIRST:
        return -1, 0
    size, position = _read_varint(position + 1, end)
    if position > end or size < 2 or size > end - position:
        return -1, 0
    return (position + 1, position + size) if load_u8(position) == kind else (-1, 0)


@kernel
def read_integers(data: Any, field: int, out: Any) -> int:
    """Read a `RepeatedValue` of INT64 or INT32 in the encoding that Protocol Buffers libraries write.

    Args:
        data: uint8[bytes], the encoded message.
        out: int64[bytes // 4]: receives the numbers.

    Returns:
        The number of integers, or -1 if the message is encoded in another way, or is another message.
    """
    position = data_of(data)
    count = 0
    end = position + data.size
    while position < end:
        source, position = _read_key(position, end, field << 3 | _VARINT)
        if source < 0:
            return -1
        number, behind = _read_varint(source, position)
        if behind != position or (field == _INT32 and np.int32(number) != number):
            return -1
        out[count] = number
        count += 1
    return count


@kernel
def read_strings(data: Any, offsets: Any, out: Any) -> int:
    """Read a `RepeatedValue` of STRING in the encoding that Protocol Buffers libraries write.

    Args:
        data: uint8[bytes], the encoded message.
        offsets: int32[bytes // 4 + 1]: receives the start of each string in `out`, and the end of the last string.
        out: uint8[bytes]: receives the strings, one after the other. They may not be valid UTF-8.

    Returns:
        The number of strings, or -1 if the message is encoded in another way, or is another message.
    """
    position = data_of(data)
    count = 0
    to = 0
    end = position + data.size
    offsets[0] = 0
    while position < end:
        source, position = _read_key(position, end, _STRING << 3 | _SIZED)
        if source < 0:
            return -1
        size, source = _read_varint(source, position)
        if source > position or size != position - source:
            return -1
        copy_bytes(data_of(out) + to, source, size)
        to += size
        count += 1
        offsets[count] = to
    return count
