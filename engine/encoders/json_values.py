"""Hand columns, statuses and times to orjson in the form that it writes fastest, without Python work per value.

NumPy arrays are written as they are. A float has NaN where it is null, which JSON does not know and orjson writes as
null; so does a stored NaN or infinity. Other types with nulls, and values of variable length, become lists first.
"""

import base64
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from engine.column import Column, ViewRows
from engine.errors import LookupInvalid
from engine.kernels.gathering import Status
from engine.schema import embedding_size

_OPTIONS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NAIVE_UTC | orjson.OPT_UTC_Z
_FLOATS = ("float32", "float64")
_STATUS_NAMES = np.array([None, *(status.name for status in Status)], object)
_FIRST_TIME, _LAST_TIME = np.array(["0001-01-01", "9999-12-31T23:59:59.999999"], "M8[us]")
_LAST_NUMPY_TIME = np.datetime64("9999-12-30T22:00:00", "us")
"""orjson writes later ones only as Python's datetime; 9999-12-31 is what many sources have for "never"."""


def dumps(document: Any) -> bytes:
    """A document that holds values of this module as JSON; naive times are taken as UTC."""
    return orjson.dumps(document, option=_OPTIONS)


def values_of(column: Column) -> Any:
    """A column's values: numbers as numbers, bytes in base64, times in RFC 3339.

    Raises:
        LookupInvalid: a time is beyond what RFC 3339 can say.
    """
    if column.feature.type in _FLOATS:
        return column.values
    if column.feature.type == "timestamp":
        return times_of(column.values, column.valid.view(np.bool_), column.reference)
    if embedding_size(column.feature.type):
        return _vectors_of(column)
    if column.feature.type == "bytes":
        values = column.to_arrow().to_pylist()
        return [None if value is None else base64.b64encode(value).decode() for value in values]
    if column.feature.type in ("bool", "int32", "int64"):
        return nullable(column.values, column.valid.view(np.bool_))
    if column.feature.type == "list<float32>":
        # As Python floats they would be written with all the digits of a float64.
        return column.to_arrow().to_numpy(zero_copy_only=False).tolist()
    return column.to_arrow().to_pylist()


def nullable(values: npt.NDArray[Any], valid: npt.NDArray[np.bool_]) -> Any:
    """Values that are null where `valid` is false."""
    return values if valid.all() else _objects(values, valid)


def _objects(values: npt.NDArray[Any], valid: npt.NDArray[np.bool_]) -> list[Any]:
    objects = values.astype(object)
    objects[~valid] = None
    as_list: list[Any] = objects.tolist()
    return as_list


def times_of(times: npt.NDArray[np.datetime64], valid: npt.NDArray[np.bool_], name: str) -> Any:
    """Times that are null where `valid` is false; `name` says whose they are.

    Raises:
        LookupInvalid: one is beyond what RFC 3339 can say.
    """
    beyond = valid & ((times < _FIRST_TIME) | (times > _LAST_TIME))
    if beyond.any():
        raise LookupInvalid(
            f"{name} holds the time {times[beyond][0]}, JSON can say only the years 1 to 9999; mend its source, or ask "
            f"for Arrow"
        )
    if (times > _LAST_NUMPY_TIME).any():
        return _objects(times, valid)
    return nullable(times, valid)


def _vectors_of(column: Column) -> Any:
    if not column.nulls:
        return column.values
    vectors: list[Any] = list(column.values)
    for key in np.flatnonzero(column.valid == 0).tolist():
        vectors[key] = None
    return vectors


class Fragments:
    """Statuses and event times of one answer as JSON, each distinct array written once."""

    def __init__(self) -> None:
        self._statuses: dict[bytes, orjson.Fragment] = {}

    def statuses(self, status: npt.NDArray[np.uint8]) -> orjson.Fragment:
        """The names of an array of Status."""
        key = status.tobytes()
        fragment = self._statuses.get(key)
        if fragment is None:
            fragment = self._statuses[key] = orjson.Fragment(dumps(_STATUS_NAMES.take(status).tolist()))
        return fragment

    def event_timestamps(self, rows: ViewRows) -> orjson.Fragment:
        """The event times of a view's rows, null where there is no row."""
        times = rows.event_timestamps
        return orjson.Fragment(dumps(times_of(times, ~np.isnat(times), f"a row of view {rows.view!r}")))
