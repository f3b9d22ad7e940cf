"""The parts of a JSON answer as text: arrays of values, statuses and event times, without Python work per value.

Kernels write values of fixed width, except float64. orjson writes the rest, from NumPy arrays where possible. A null
float is NaN in memory. JSON has no NaN or infinity, so kernels and orjson write both as null.
"""

import base64
import math
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa

from shoal.engine.format.schema import embedding_size
from shoal.engine.kernels import json_text
from shoal.engine.kernels.decimal import MAX_TIME
from shoal.engine.kernels.json_text import Form
from shoal.engine.lookup.allowance import UNLIMITED, Allowance
from shoal.engine.lookup.result import ViewColumns
from shoal.engine.lookup.result_column import Column, ViewRows

_FORMS = {
    "bool": Form.BOOL,
    "int32": Form.INT32,
    "int64": Form.INT64,
    "float32": Form.FLOAT32,
    "timestamp": Form.TIME,
}
_FLOAT_FORMS = (Form.FLOAT32, Form.FLOATS)
_BRACKETS = 2
_KEYS_AT_ONCE = 1024
"""The number of keys per call of orjson. A call holds Python's global interpreter lock (GIL); other threads can run
between calls."""


def dumps(document: Any) -> bytes:
    """Return a document as JSON; it may contain NumPy arrays."""
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)


def values_of(
    part: ViewColumns, allowance: Allowance = UNLIMITED, *, seconds: bool = False, named_floats: bool = False
) -> list[bytes]:
    """Return the values of each feature as JSON: numbers as numbers, bytes in base64, times in RFC 3339.

    Args:
        seconds: write times as whole seconds since 1970 instead.
        named_floats: write a float32 with all the digits of a float64, and infinities as "Infinity" and "-Infinity"
            instead of null. In a list, write NaN as "NaN" instead of null.

    Raises:
        ViewDamaged: a stored text is not UTF-8.
        RequestTooLarge: the values exceed the allowance.
    """
    forms, most_bytes = _forms(part.program.types, seconds, named_floats)
    features, keys = part.valid.shape
    text = np.empty(most_bytes * keys + _BRACKETS * features + json_text.OVERWRITTEN, np.uint8)
    ends = np.empty(features, np.int64)
    json_text.write_columns(forms, part.arena, part.starts, part.valid, text, ends)
    allowance.take(int(ends[-1]))
    written = text[: ends[-1]].tobytes()
    start = 0
    texts = []
    for feature, end in enumerate(ends.tolist()):
        in_python = end == start
        texts.append(_dumps_column(part.columns[feature], named_floats, allowance) if in_python else written[start:end])
        start = end
    return texts


def statuses_of(part: ViewColumns) -> list[bytes]:
    """Return the statuses of each feature, as JSON."""
    of_rows = row_statuses(part.rows.status)
    return [
        _statuses(part.rows.status, part.valid[feature]) if nulls else of_rows
        for feature, nulls in enumerate(part.nulls.tolist())
    ]


def row_statuses(status: npt.NDArray[np.uint8]) -> bytes:
    """Return the names of the statuses of rows, as JSON."""
    return _statuses(status, np.ones(status.size, np.uint8))


def _statuses(status: npt.NDArray[np.uint8], valid: npt.NDArray[np.uint8]) -> bytes:
    """Return the names of the statuses of a column, as JSON. `valid`, uint8[keys], is 0 for a value that is null."""
    text = np.empty(json_text.MAX_STATUS * status.size + _BRACKETS, np.uint8)
    return text[: json_text.write_statuses(status, valid, text)].tobytes()


def event_times_of(rows: ViewRows, absent: int = json_text.NULL_TIME) -> bytes:
    """Return the event times of a view's rows, as JSON. A key without a row gets `absent`, in microseconds since 1970,
    or null by default."""
    text = np.empty(MAX_TIME * rows.event_time.size + _BRACKETS, np.uint8)
    return text[: json_text.write_event_times(rows.event_time, absent, text)].tobytes()


@lru_cache(maxsize=256)
def _forms(types: tuple[str, ...], seconds: bool, named_floats: bool) -> tuple[npt.NDArray[np.int64], int]:
    """Return the table of forms for features of the given types, and the maximum size in bytes of the values of one
    key."""
    rows = []
    most_bytes = 0
    for feature_type in types:
        items = embedding_size(feature_type)
        form = Form.FLOATS if items else _FORMS.get(feature_type, Form.ELSEWHERE)
        if form is Form.TIME and seconds:
            form = Form.SECONDS
        if form in _FLOAT_FORMS and named_floats:
            form = Form.ELSEWHERE
        rows.append([int(form), items or 1])
        most_bytes += json_text.most_bytes(form, items or 1)
    return np.array(rows, np.int64), most_bytes


def _dumps_column(column: Column, named_floats: bool, allowance: Allowance) -> bytes:
    """Return the values of a column that the kernels do not write, as JSON."""
    pieces = []
    for start in range(0, column.valid.size, _KEYS_AT_ONCE):
        piece = dumps(_objects(column.slice(start, start + _KEYS_AT_ONCE), named_floats))
        allowance.take(len(piece))
        pieces.append(piece[1:-1])
    return b"[%b]" % b",".join(pieces)


def _objects(column: Column, named_floats: bool) -> Any:
    """Return the values of a column that the kernels do not write, as input for orjson."""
    if named_floats and "float" in column.feature.type:
        return _named_floats(column)
    if column.feature.type == "float64":
        return column.values
    if column.feature.type == "bytes":
        return [None if value is None else base64.b64encode(value).decode() for value in column.to_pylist()]
    if column.feature.type == "list<float32>":
        # The values stay NumPy arrays, because Python floats would be written with all the digits of a float64.
        return column.to_arrow().to_numpy(zero_copy_only=False).tolist()
    return column.to_pylist()


def _named_floats(column: Column) -> Any:
    """Return floats with the digits of a float64, and infinities by name. In a list, return NaN by name; otherwise,
    return null for NaN."""
    values = column.to_arrow()
    if not pa.types.is_floating(values.type):
        items = np.asarray(values.flatten())
        return (
            values.to_pylist() if np.isfinite(items).all() else [_list_of_named(items) for items in values.to_pylist()]
        )
    # A null is NaN here, and orjson writes NaN as null.
    numbers = column.values.astype(np.float64)
    if not np.isinf(numbers).any():
        return numbers
    return [None if math.isnan(number) else _named(number) for number in numbers.tolist()]


def _list_of_named(items: list[float] | None) -> list[float | str] | None:
    return None if items is None else [_named(item) for item in items]


def _named(number: float) -> float | str:
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"
