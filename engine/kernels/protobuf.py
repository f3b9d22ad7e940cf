"""Write gathered columns and event times as fields of Protocol Buffers, straight from the memory that they stand in,
and read the keys of a request.

A column is a repeated field 1 of Feast's messages `Value`, each a oneof: the field that is set says the type, and none
is where there is no value. Source: Protocol Buffers, "Encoding".
"""

from enum import IntEnum
from typing import Any

import numpy as np
from numba import njit

from engine.kernels.compiling import kernel
from engine.kernels.gathering import NO_EVENT_TIME
from engine.kernels.memory import copy_bytes, data_of, load_i32, load_i64, load_u8, store_i32, store_i64, store_u8

# Columns of the table of fields, int64[features, FIELD_COLUMNS].
FIELD = 0
ITEMS = 1
FIELD_COLUMNS = 2


class Field(IntEnum):
    """The field of a `Value` that the values of a column are; the numbers are Feast's."""

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
"""In the table of fields: not of fixed width, so not written by `write_columns`."""

MAX_TIMESTAMP = 2 + 11 + 6
"""The most bytes that an event time takes."""
OVERWRITTEN = 8
"""Bytes behind the end of what is written that a kernel may write to."""

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
    """The most bytes that a value of fixed width takes; `items` is the length of an embedding, or 1."""
    return max(_MAX_HEAD + 4 * items, 2 + 1 + _MAX_VARINT)


def most_bytes_of_heap(field: Field, keys: int, size: int) -> int:
    """The most bytes that a column of variable-length values takes, which are of `size` bytes together."""
    # The smallest thing that is written larger than it lies there: an int64 in a list, of 8 bytes, takes up to 10, and
    # a string in a list has its end before it, of 4 bytes, where its tag and its size take up to 6.
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
    """A field that holds `size` bytes, which come next."""
    return _write_varint(_write_varint(to, tag), size)


@njit(inline="always")
def _sized(size: int) -> Any:
    """What `size` bytes take as a field with a tag of one byte."""
    return 1 + _varint_size(size) + size


@njit(inline="always")
def _open_value(to: int, field: int, size: int) -> Any:
    """A `Value` of which a field holds `size` bytes, which come next."""
    tag = field << 3 | _SIZED
    to = _open(to, _FIRST, _varint_size(tag) + _varint_size(size) + size)
    return _open(to, tag, size)


@njit(inline="always")
def _open_floats(to: int, size: int) -> Any:
    """A `Value` that is a list of float32 of `size` bytes, which come next."""
    if size == 0:
        return _open_value(to, _FLOAT_LIST, 0)
    return _open(_open_value(to, _FLOAT_LIST, _sized(size)), _FIRST, size)


@njit(inline="always")
def _write_nothing(to: int) -> Any:
    """A `Value` without a field."""
    store_u8(to, _FIRST)
    store_u8(to + 1, 0)
    return to + 2


@njit(inline="always")
def _write_value(to: int, field: int, items: int, source: int) -> Any:
    """A value of fixed width."""
    if field == _FLOAT:
        # Head and number are seven bytes: one store.
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
def write_columns(fields: Any, arena: Any, at: Any, valid: Any, out: Any, ends: Any) -> None:
    """Write the columns of fixed width, each as its values.

    Args:
        fields: int64[features, FIELD_COLUMNS]: the Field of each column, or ELSEWHERE, and how many items a value has.
        arena, at, valid: as `engine.kernels.answering.answer_columns` left them.
        out: uint8[bytes], becomes the columns, one after the other.
        ends: int64[features], becomes where in it each ends; an ELSEWHERE column has none.
    """
    to = data_of(out)
    for feature in range(fields.shape[0]):
        field, items = fields[feature, FIELD], fields[feature, ITEMS]
        if field != ELSEWHERE:
            source, width = data_of(arena) + at[feature], _width(field, items)
            for key in range(valid.shape[1]):
                there = valid[feature, key]
                to = _write_value(to, field, items, source + width * key) if there else _write_nothing(to)
        ends[feature] = to - data_of(out)


@njit(inline="always")
def _write_integers(to: int, source: int, count: int) -> Any:
    """A `Value` that is a list of int64."""
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
    """A `Value` that is a list of strings, from their count, the end of each, and their bytes."""
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
    """Write one column of variable-length values, of which value i is data[offsets[i]:offsets[i + 1]], into `out`,
    uint8[bytes]. Returns where it ends."""
    to = data_of(out)
    for key in range(valid.size):
        source, size = data_of(data) + offsets[key], np.int64(offsets[key + 1]) - offsets[key]
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
    """Write event times, int64[keys] microseconds since 1970, as a repeated field 3 of `Timestamp`; NO_EVENT_TIME is
    1970, which is an empty one. Returns where they end."""
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
def _read_varint(at: int, end: int) -> Any:
    """A number, and where it ends: behind `end` if it goes on there."""
    number, shift = np.uint64(0), np.uint64(0)
    while at < end and shift < np.uint64(64):
        byte = np.uint64(load_u8(at))
        at += 1
        number |= (byte & np.uint64(0x7F)) << shift
        if byte < np.uint64(0x80):
            return np.int64(number), at
        shift += np.uint64(7)
    return np.int64(0), end + 1


@njit(inline="always")
def _read_key(at: int, end: int, kind: int) -> Any:
    """Where the content of the `Value` at an address begins, and where it ends; -1 if it is not one field of a kind."""
    if load_u8(at) != _FIRST:
        return -1, 0
    size, at = _read_varint(at + 1, end)
    if at > end or size < 2 or size > end - at:
        return -1, 0
    return (at + 1, at + size) if load_u8(at) == kind else (-1, 0)


@kernel
def read_integers(data: Any, field: int, out: Any) -> int:
    """Read a `RepeatedValue` of INT64 or INT32 as its encoders write it.

    Args:
        data: uint8[bytes], the encoded message.
        out: int64[bytes // 4], becomes the numbers.

    Returns:
        How many there are, or -1 if it is written otherwise, or is something else.
    """
    at, count = data_of(data), 0
    end = at + data.size
    while at < end:
        source, at = _read_key(at, end, field << 3 | _VARINT)
        if source < 0:
            return -1
        number, behind = _read_varint(source, at)
        if behind != at or (field == _INT32 and np.int32(number) != number):
            return -1
        out[count] = number
        count += 1
    return count


@kernel
def read_strings(data: Any, offsets: Any, out: Any) -> int:
    """Read a `RepeatedValue` of STRING as its encoders write it.

    Args:
        data: uint8[bytes], the encoded message.
        offsets: int32[bytes // 4 + 1], becomes where each string begins in `out`, and at last where the last ends.
        out: uint8[bytes], becomes the strings, one after the other, which may not be UTF-8.

    Returns:
        How many there are, or -1 if it is written otherwise, or is something else.
    """
    at, count, to = data_of(data), 0, 0
    end = at + data.size
    offsets[0] = 0
    while at < end:
        source, at = _read_key(at, end, _STRING << 3 | _SIZED)
        if source < 0:
            return -1
        size, source = _read_varint(source, at)
        if source > at or size != at - source:
            return -1
        copy_bytes(data_of(out) + to, source, size)
        to += size
        count += 1
        offsets[count] = to
    return count
