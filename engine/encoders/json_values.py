"""The parts of a JSON answer as text: values, statuses and event times, an array each, without Python work per value.

Kernels write what a row holds in itself. orjson writes the rest, from NumPy arrays where there are such. A null float
is NaN, which JSON does not know and both write as null; so is a stored NaN or infinity.
"""

import base64
import math
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa

from engine.allowance import UNLIMITED, Allowance
from engine.column import Column, ViewRows
from engine.kernels import json_text
from engine.kernels.decimal import MAX_TIME
from engine.kernels.json_text import Form
from engine.result import ViewColumns
from engine.schema import embedding_size

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
"""Keys per call of orjson, which holds the interpreter's lock. Between calls other threads can run."""


def dumps(document: Any) -> bytes:
    """A document that may hold NumPy arrays, as JSON."""
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)


def values_of(
    part: ViewColumns, allowance: Allowance = UNLIMITED, *, seconds: bool = False, named_floats: bool = False
) -> list[bytes]:
    """The values of each feature: numbers as numbers, bytes in base64, times in RFC 3339, or in whole seconds.

    Args:
        named_floats: write a float32 with all the digits of a float64, and infinities as "Infinity" and "-Infinity",
            also "NaN" in a list, instead of null.

    Raises:
        ViewDamaged: a stored text is not UTF-8.
        RequestTooLarge: they take more than the allowance.
    """
    forms, most_bytes = _forms(part.program.types, seconds, named_floats)
    features, keys = part.valid.shape
    text = np.empty(most_bytes * keys + _BRACKETS * features + json_text.OVERWRITTEN, np.uint8)
    ends = np.empty(features, np.int64)
    json_text.write_columns(forms, part.arena, part.starts, part.valid, text, ends)
    allowance.take(int(ends[-1]))
    written, start, texts = text[: ends[-1]].tobytes(), 0, []
    for feature, end in enumerate(ends.tolist()):
        in_python = end == start
        texts.append(_dumps_column(part.columns[feature], named_floats, allowance) if in_python else written[start:end])
        start = end
    return texts


def statuses_of(part: ViewColumns) -> list[bytes]:
    """The statuses of each feature."""
    of_rows = row_statuses(part.rows.status)
    return [
        _statuses(part.rows.status, part.valid[feature]) if nulls else of_rows
        for feature, nulls in enumerate(part.nulls.tolist())
    ]


def row_statuses(status: npt.NDArray[np.uint8]) -> bytes:
    """The names of the statuses of rows."""
    return _statuses(status, np.ones(status.size, np.uint8))


def _statuses(status: npt.NDArray[np.uint8], valid: npt.NDArray[np.uint8]) -> bytes:
    """The names of statuses, as a column has them that is null where `valid`, uint8[keys], is 0."""
    text = np.empty(json_text.MAX_STATUS * status.size + _BRACKETS, np.uint8)
    return text[: json_text.write_statuses(status, valid, text)].tobytes()


def event_times_of(rows: ViewRows, absent: int = json_text.NULL_TIME) -> bytes:
    """The event times of a view's rows; `absent`, in microseconds since 1970, where there is no row, else null."""
    text = np.empty(MAX_TIME * rows.event_time.size + _BRACKETS, np.uint8)
    return text[: json_text.write_event_times(rows.event_time, absent, text)].tobytes()


@lru_cache(maxsize=256)
def _forms(types: tuple[str, ...], seconds: bool, named_floats: bool) -> tuple[npt.NDArray[np.int64], int]:
    """The table of forms for features of some types, and the most bytes that all of a key's values take."""
    rows, most_bytes = [], 0
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
    """Return the values of a column that no kernel encodes, as JSON."""
    pieces = []
    for start in range(0, column.valid.size, _KEYS_AT_ONCE):
        piece = dumps(_objects(column.slice(start, start + _KEYS_AT_ONCE), named_floats))
        allowance.take(len(piece))
        pieces.append(piece[1:-1])
    return b"[%b]" % b",".join(pieces)


def _objects(column: Column, named_floats: bool) -> Any:
    """The values of a column that the kernels do not write."""
    if named_floats and "float" in column.feature.type:
        return _named_floats(column)
    if column.feature.type == "float64":
        return column.values
    if column.feature.type == "bytes":
        return [None if value is None else base64.b64encode(value).decode() for value in column.to_pylist()]
    if column.feature.type == "list<float32>":
        # As Python floats they would be written with all the digits of a float64.
        return column.to_arrow().to_numpy(zero_copy_only=False).tolist()
    return column.to_pylist()


def _named_floats(column: Column) -> Any:
    """Floats with the digits of a float64; what is no number by its name, but null where a scalar is NaN."""
    values = column.to_arrow()
    if not pa.types.is_floating(values.type):
        items = np.asarray(values.flatten())
        return (
            values.to_pylist() if np.isfinite(items).all() else [_list_of_named(items) for items in values.to_pylist()]
        )
    # A null is NaN here, and orjson writes both as null.
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
