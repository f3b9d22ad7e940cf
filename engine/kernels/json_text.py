"""Write gathered columns, statuses and event times as JSON arrays, directly from the gathered memory."""

from enum import IntEnum
from typing import Any

import numpy as np
from numba import njit

from shoal.engine.kernels.compiling import kernel
from shoal.engine.kernels.decimal import (
    MAX_NUMBER,
    MAX_TIME,
    write_float32,
    write_integer,
    write_time,
)
from shoal.engine.kernels.gathering import NO_EVENT_TIME, Status
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

# Columns of the table of forms, int64[features, FORM_COLUMNS].
FORM = 0
ITEMS = 1
FORM_COLUMNS = 2


class Form(IntEnum):
    """The JSON form of a column's values. These kernels do not write ELSEWHERE columns."""

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
"""The maximum size of a status in bytes, including a comma."""

OVERWRITTEN = 8
"""The number of bytes after the end of a number that a kernel may overwrite."""

NULL_TIME = NO_EVENT_TIME
"""The event time that is written as null."""


def most_bytes(form: Form, items: int) -> int:
    """Return the maximum size of a value in bytes, including a comma; `items` is the length of an embedding, or 1."""
    return MAX_TIME if form is Form.TIME else MAX_NUMBER * items + 3


@njit(inline="always")
def _close(start: int, to: int) -> Any:
    """End the array that began at `start`. If the array has items, replace the comma after the last item."""
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
    """Write a float32, or null for NaN and infinity, since JSON has neither."""
    if bits & _INFINITY == _INFINITY:
        return _write_null(to)
    return write_float32(to, bits)


@njit(inline="always")
def _write_value(to: int, form: int, items: int, source: int) -> Any:
    """Write a value that is not null. A gathered time is always in the range of `shoal.engine.base.times`."""
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
    # Round towards 1970, as Feast does.
    time = load_i64(source)
    return write_integer(to, time // 1_000_000 if time >= 0 else -(-time // 1_000_000))


@kernel
def write_columns(forms: Any, arena: Any, column_starts: Any, valid: Any, text: Any, ends: Any) -> None:
    """Write each column as an array of its values, with null for an absent value, NaN or infinity.

    Args:
        forms: int64[features, FORM_COLUMNS]: the Form of each column, and the number of items in a value.
        arena, column_starts, valid: as `shoal.engine.kernels.answering.answer_columns` left them.
        text: uint8[bytes]: receives the texts, one after the other.
        ends: int64[features]: receives the end of each column in `text`; an ELSEWHERE column adds no text.
    """
    to = data_of(text)
    for feature in range(forms.shape[0]):
        form = forms[feature, FORM]
        items = forms[feature, ITEMS]
        if form != _ELSEWHERE:
            start = to
            source = data_of(arena) + column_starts[feature]
            width = _WIDTHS[form] * items
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
    """Write event times, int64[keys] microseconds since 1970, as an array; return the size of the text in bytes.
    `absent` replaces NO_EVENT_TIME; it is a time or NULL_TIME."""
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
    """Write the names of a column's statuses as an array; return the size of the text in bytes. `status`, uint8[keys],
    has the Status of each row. A value is NULL_VALUE if its row is PRESENT and its `valid` is 0."""
    start = data_of(text)
    store_u8(start, _OPEN)
    to = start + 1
    for key in range(status.size):
        own = status[key]
        if own == _PRESENT and not valid[key]:
            own = _NULL_VALUE
        begin = _NAME_ENDS[own]
        end = _NAME_ENDS[own + 1]
        copy_bytes(to, data_of(_NAME_BYTES) + begin, end - begin)
        to += end - begin
    return int(_close(start, to) - start)
