"""The range of event times and of timestamp features: the years 1 to 9999, in UTC.

JSON (RFC 3339), Protocol Buffers and Python cannot represent other times. Rows are checked wherever they enter Shoal. A
store from an older version may contain times outside the range. For such a time, a lookup returns the nearest time in
the range.
"""

from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

FIRST_TIME = -62_135_596_800_000_000
"""0001-01-01T00:00:00Z in microseconds since 1970."""
LAST_TIME = 253_402_300_799_999_999
"""9999-12-31T23:59:59.999999Z in microseconds since 1970."""
ALLOWED_YEARS = "the years 1 to 9999, in UTC"

FURTHEST_AHEAD = timedelta(days=1)
"""How far an event time may be ahead of the clock of the process that accepts the row. A later event time is a mistake.
If it were accepted, every correct row of the same key would count as late."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_UNITS = {"s": 1_000_000, "ms": 1_000, "us": 1}
"""Microseconds per Arrow time unit. A time in nanoseconds that fits into an int64 is always in the range, so
nanoseconds are not listed."""


def to_micros(moment: datetime) -> int:
    """Return an aware datetime as microseconds since 1970."""
    return (moment - _EPOCH) // _MICROSECOND


def to_datetime(micros: int) -> datetime:
    """Return microseconds since 1970 as a datetime in UTC; a time outside the range becomes the nearest time in the
    range."""
    return _EPOCH + min(max(micros, FIRST_TIME), LAST_TIME) * _MICROSECOND


def time_before(now: int, age: int) -> int:
    """Return `now - age`, in microseconds, limited to the range of int64."""
    return min(max(now - age, -(2**63)), 2**63 - 1)


def from_seconds(seconds: int) -> datetime | None:
    """Return seconds since 1970 as a datetime in UTC; None if the time is outside the range."""
    micros = 1_000_000 * seconds
    return to_datetime(micros) if FIRST_TIME <= micros <= LAST_TIME else None


def shown_time(micros: int) -> str:
    """Return a time in ISO 8601 for a message. Times outside the range are allowed too."""
    if not -(2**63) < micros < 2**63:
        return f"{micros} microseconds since 1970"
    return f"{np.datetime64(micros, 'us')}Z"


def outside_range(times: pa.Array) -> tuple[int, int] | None:
    """Find the first timestamp that is outside the range.

    Args:
        times: an array of timestamps in any unit; nulls are in range.

    Returns:
        The timestamp's position, and its value in microseconds since 1970; None if all timestamps are in the range.
    """
    micros = _UNITS.get(times.type.unit)
    if micros is None:
        return None
    numbers = times.view(pa.int64())
    first = -(-FIRST_TIME // micros)
    last = LAST_TIME // micros
    return _first_outside(numbers, first, last, micros)


def later_than(times: pa.Array, latest: datetime) -> tuple[int, int] | None:
    """Find the first time that is later than `latest`. `times` is of type timestamp[us]. Return the same as
    `outside_range`."""
    return _first_outside(times.view(pa.int64()), -(2**63), to_micros(latest), 1)


def _first_outside(numbers: pa.Array, first: int, last: int, micros: int) -> tuple[int, int] | None:
    bounds = pc.min_max(numbers)
    least = bounds["min"].as_py()
    most = bounds["max"].as_py()
    if least is None or (least >= first and most <= last):
        return None
    outside = pc.or_(pc.less(numbers, first), pc.greater(numbers, last))
    position: int = pc.index(outside, True).as_py()
    return position, micros * numbers[position].as_py()
