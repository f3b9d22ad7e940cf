"""Write gathered columns, statuses and event times as JSON arrays, straight from the memory that they stand in."""

from enum import IntEnum
from typing import Any

import numpy as np
from numba import njit

from engine.kernels.compiling import kernel
from engine.kernels.decimal import MAX_NUMBER, MAX_TIME, write_float32, write_integer, write_time
from engine.kernels.gathering import NO_EVENT_TIME, Status
from engine.kernels.memory import copy_bytes, data_of, load_i32, load_i64, load_u8, store_i32, store_i64, store_u8

# Columns of the table of forms, int64[features, FORM_COLUMNS].
FORM = 0
ITEMS = 1
FORM_COLUMNS = 2


class Form(IntEnum):
    """How the values of a column are written; ELSEWHERE is not by these kernels."""

    ELSEWHERE = 0
    BOOL = 1
    INT32 = 2
    INT64 = 3
    FLOAT32 = 4
    FLOATS = 5
    TIME = 6
    SECONDS = 7


_ELSEWHERE = int(Form.ELSEWHERE)
_BOOL = int(Form.BOOL)
_INT32 = int(Form.INT32)
_INT64 = int(Form.INT64)
_FLOAT32 = int(Form.FLOAT32)
_FLOATS = int(Form.FLOATS)
_TIME = int(Form.TIME)
_PRESENT = int(Status.PRESENT)
_NULL_VALUE = int(Status.NULL_VALUE)
_WIDTHS = np.array([0, 1, 4, 8, 4, 4, 8, 8], np.int64)

_OPEN, _CLOSE, _COMMA = b"[],"
_NULL = int.from_bytes(b"null", "little")
_TRUE = int.from_bytes(b"true", "little")
_FALSE = int.from_bytes(b"false\0\0\0", "little")
_INFINITY = 0x7F800000

_NAMES = [b"", *(f'"{status.name}",'.encode() for status in Status)]
_NAME_BYTES = np.frombuffer(b"".join(_NAMES), np.uint8)
_NAME_ENDS = np.cumsum([len(name) for name in _NAMES])
MAX_STATUS = max(map(len, _NAMES))
"""The most bytes that a status takes, with a comma."""

OVERWRITTEN = 8
"""Bytes behind the end of a number that may be written to."""

NULL_TIME = NO_EVENT_TIME
"""What stands for no event time: null is written."""


def most_bytes(form: Form, items: int) -> int:
    """The most bytes that a value takes, with a comma; `items` is the length of an embedding, or 1."""
    return MAX_TIME if form is Form.TIME else MAX_NUMBER * items + 3


@njit(inline="always")
def _close(start: int, to: int) -> Any:
    """Turn the comma after the last item, if there is one, into the end of the array that began at `start`."""
    if to > start + 1:
        to -= 1
    store_u8(to, _CLOSE)
    return to + 1


@njit(inline="always")
def _write_null(to: int) -> Any:
    store_i32(to, _NULL)
    return to + 4


@njit(inline="always")
def _write_float(to: int, bits: int) -> Any:
    """A float32; null, which is what JSON has, if it is no number."""
    if bits & _INFINITY == _INFINITY:
        return _write_null(to)
    return write_float32(to, bits)


@njit(inline="always")
def _write_value(to: int, form: int, items: int, source: int) -> Any:
    """One value that is there; a time is in the range of `engine.times`, since it was gathered."""
    if form == _FLOAT32:
        return _write_float(to, load_i32(source))
    if form == _INT64:
        return write_integer(to, load_i64(source))
    if form == _INT32:
        return write_integer(to, load_i32(source))
    if form == _BOOL:
        is_true = load_u8(source)
        store_i64(to, _TRUE if is_true else _FALSE)
        return to + (4 if is_true else 5)
    if form == _TIME:
        return write_time(to, load_i64(source))
    if form == _FLOATS:
        start = to
        store_u8(to, _OPEN)
        to += 1
        for item in range(items):
            to = _write_float(to, load_i32(source + 4 * item))
            store_u8(to, _COMMA)
            to += 1
        return _close(start, to)
    # Towards 1970, as Feast does.
    time = load_i64(source)
    return write_integer(to, time // 1_000_000 if time >= 0 else -(-time // 1_000_000))


@kernel
def write_columns(forms: Any, arena: Any, at: Any, valid: Any, text: Any, ends: Any) -> None:
    """Write each column as an array of its values, null where it has none and where a float is no number.

    Args:
        forms: int64[features, FORM_COLUMNS]: the Form of each column, and how many items a value has.
        arena, at, valid: as `engine.kernels.answering.answer_columns` left them.
        text: uint8[bytes], becomes the texts, one after the other.
        ends: int64[features], becomes where in it each ends; an ELSEWHERE column has none.
    """
    to = data_of(text)
    for feature in range(forms.shape[0]):
        form, items = forms[feature, FORM], forms[feature, ITEMS]
        if form != _ELSEWHERE:
            start = to
            source, width = data_of(arena) + at[feature], _WIDTHS[form] * items
            store_u8(to, _OPEN)
            to += 1
            for key in range(valid.shape[1]):
                to = _write_value(to, form, items, source + width * key) if valid[feature, key] else _write_null(to)
                store_u8(to, _COMMA)
                to += 1
            to = _close(start, to)
        ends[feature] = to - data_of(text)


@kernel
def write_event_times(event_time: Any, absent: int, text: Any) -> int:
    """Write event times, int64[keys] microseconds since 1970, as an array; `absent` stands in for NO_EVENT_TIME, and is
    NULL_TIME or a time. Returns where the text ends."""
    start = data_of(text)
    store_u8(start, _OPEN)
    to = start + 1
    for key in range(event_time.size):
        time = event_time[key]
        if time == NO_EVENT_TIME:
            time = absent
        to = _write_null(to) if time == NULL_TIME else write_time(to, time)
        store_u8(to, _COMMA)
        to += 1
    return int(_close(start, to) - start)


@kernel
def write_statuses(status: Any, valid: Any, text: Any) -> int:
    """Write the names of a column's Status, uint8[keys] of its rows; those whose `valid` is 0 in a row that is PRESENT
    are NULL_VALUE. Returns where the text ends."""
    start = data_of(text)
    store_u8(start, _OPEN)
    to = start + 1
    for key in range(status.size):
        own = status[key]
        if own == _PRESENT and not valid[key]:
            own = _NULL_VALUE
        begin, end = _NAME_ENDS[own], _NAME_ENDS[own + 1]
        copy_bytes(to, data_of(_NAME_BYTES) + begin, end - begin)
        to += end - begin
    return int(_close(start, to) - start)
