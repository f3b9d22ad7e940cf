"""Strategies for values of every feature type, and the form in which tests compare values."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
from hypothesis import strategies as st

from shoal.engine.format.schema import arrow_type

_MICRO = timedelta(microseconds=1)
_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
_FLOAT32 = st.floats(width=32)
_INT64 = st.integers(-(2**63), 2**63 - 1)
_INSTANTS = st.integers(-(10**15), 4 * 10**15).map(lambda micros: datetime(1970, 1, 1, tzinfo=UTC) + micros * _MICRO)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "bool": st.booleans(),
    "int32": st.integers(-(2**31), 2**31 - 1),
    "int64": _INT64,
    "float32": _FLOAT32,
    "float64": st.floats(),
    "string": _TEXT,
    "bytes": st.binary(max_size=12),
    "timestamp": _INSTANTS,
    "list<int64>": st.lists(_INT64, max_size=4),
    "list<float32>": st.lists(_FLOAT32, max_size=4),
    "list<string>": st.lists(_TEXT, max_size=4),
    "float32[1]": st.lists(_FLOAT32, min_size=1, max_size=1),
    "float32[3]": st.lists(_FLOAT32, min_size=3, max_size=3),
}


def comparable(values: list[Any], feature_type: str) -> list[Any]:
    """Return values as a feature of this type holds them, in a form in which NaN equals NaN and 0.0 is not -0.0."""
    return [plain(value) for value in pa.array(values, arrow_type(feature_type)).to_pylist()]


def plain(value: Any) -> Any:
    """Return one value in the form of `comparable`."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    return repr(value) if isinstance(value, float) else value
