"""Numbers and times as text: the shortest text that is read as the same number, equal to the text of other writers."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engine.encoders.json_values import event_times_of
from shoal.engine.kernels import json_text
from shoal.engine.kernels.json_text import Form
from shoal.engine.lookup.result_column import ViewRows

POWERS_OF_TWO = np.ldexp(np.float32(1), np.arange(-149, 128)).astype(np.float32)
POWERS_OF_TEN = np.array([f"1e{exponent}" for exponent in range(-45, 39)], np.float32)
EDGES = np.concatenate(
    [
        POWERS_OF_TWO,
        np.nextafter(POWERS_OF_TWO, np.float32(0)),
        np.nextafter(POWERS_OF_TWO, np.float32(np.inf)),
        POWERS_OF_TEN,
        np.nextafter(POWERS_OF_TEN, np.float32(0)),
        np.nextafter(POWERS_OF_TEN, np.float32(np.inf)),
        np.arange(-3000, 3000, dtype=np.float32),
        np.arange(3000, dtype=np.float32) / 8,
        np.array([0.0, -0.0, 16777216, 33554431, 8.5e-46, 3.4028235e38], np.float32),
    ]
)


def write(form: Form, values: npt.NDArray[Any], valid: Sequence[bool] | None = None) -> bytes:
    """Return a column of values as the kernel writes it."""
    forms = np.array([[int(form), 1]], np.int64)
    mask = np.ones((1, values.size), np.uint8) if valid is None else np.array([valid], np.uint8)
    text = np.empty(json_text.most_bytes(form, 1) * values.size + 16, np.uint8)
    ends = np.empty(1, np.int64)
    json_text.write_columns(forms, values.view(np.uint8), np.zeros(1, np.int64), mask, text, ends)
    return text[: ends[0]].tobytes()


def check_floats(values: npt.NDArray[np.float32]) -> None:
    """Assert that each value is read as itself, and equals the number that orjson, another implementation, writes."""
    text = write(Form.FLOAT32, values)
    read = np.array(orjson.loads(text), np.float64)
    assert np.array_equal(read.astype(np.float32).view(np.uint32), values.view(np.uint32))
    others = orjson.loads(orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY))
    assert read.tolist() == others


def test_floats_at_the_edges() -> None:
    check_floats(EDGES[np.isfinite(EDGES)])


@pytest.mark.parametrize("seed", range(4))
def test_floats_of_any_bits(seed: int) -> None:
    bits = np.random.default_rng(seed).integers(0, 2**32, 500_000, dtype=np.uint32)
    values = bits.view(np.float32)
    check_floats(values[np.isfinite(values)])


@pytest.mark.parametrize("digits", range(1, 9))
def test_floats_that_were_decimals(digits: int) -> None:
    numbers = np.random.default_rng(digits).integers(0, 10**digits, 50_000)
    check_floats((numbers / 10.0**digits).astype(np.float32))
    check_floats((numbers * 10.0 ** (3 * digits)).astype(np.float32))


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_any_floats(values: list[float]) -> None:
    check_floats(np.array(values, np.float32))


def test_how_floats_look() -> None:
    values = np.array([0, -0.0, 1, -1.5, 0.1, 1e-4, 1.5e-5, 123456.79, 1e15, 1e16, 3.4028235e38, 1e-45], np.float32)
    assert write(Form.FLOAT32, values) == (
        b"[0.0,-0.0,1.0,-1.5,0.1,0.0001,0.000015,123456.79,1000000000000000.0,1e+16,3.4028235e+38,1e-45]"
    )


def test_what_is_no_number_is_null() -> None:
    values = np.array([np.nan, np.inf, -np.inf, 1], np.float32)
    assert write(Form.FLOAT32, values, [True, True, True, False]) == b"[null,null,null,null]"


@pytest.mark.parametrize(
    ("form", "dtype", "strategy"),
    [
        (Form.INT64, np.int64, st.integers(-(2**63), 2**63 - 1)),
        (Form.INT32, np.int32, st.integers(-(2**31), 2**31 - 1)),
        (Form.BOOL, np.bool_, st.booleans()),
    ],
)
def test_whole_numbers(form: Form, dtype: Any, strategy: Any) -> None:
    @settings(max_examples=200)
    @given(st.lists(st.tuples(strategy, st.booleans())))
    def check(values: list[tuple[Any, bool]]) -> None:
        text = write(form, np.array([value for value, _ in values], dtype), [valid for _, valid in values])
        assert orjson.loads(text) == [value if valid else None for value, valid in values]

    check()


def rfc3339(time: datetime) -> str:
    """Return a time as Protobuf's JSON writes it, with 0, 3 or 6 digits after the second, as few as possible."""
    if time.microsecond % 1000:
        return time.isoformat(timespec="microseconds") + "Z"
    return time.isoformat(timespec="milliseconds" if time.microsecond else "seconds") + "Z"


@settings(max_examples=300)
@given(st.lists(st.datetimes() | st.datetimes().map(lambda time: time.replace(microsecond=123_000))))
def test_times(times: list[datetime]) -> None:
    values = np.array(times, "M8[us]")
    expected = orjson.dumps([rfc3339(time) for time in times])
    assert write(Form.TIME, values) == expected
    rows = ViewRows("docs", np.ones(values.size, np.uint8), values.view(np.int64))
    assert event_times_of(rows) == expected


def test_times_as_seconds() -> None:
    values = np.array(["1970-01-01T00:00:01.999999", "1969-12-31T23:59:57.000001"], "M8[us]")
    assert write(Form.SECONDS, values) == b"[1,-2]"
