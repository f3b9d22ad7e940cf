"""The times that Shoal takes as event times and as values of timestamp features: those of the years 1 to 9999, in UTC.

JSON (RFC 3339), Protocol Buffers and Python have no others. Rows are checked wherever they enter. A store that an older
version wrote may hold other times: lookups answer those as the nearest time in the range.
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
"""How far an event time may be ahead of the clock of the process that takes the row. A later one is a mistake, and it
would make every correct row of its key late."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_UNITS = {"s": 1_000_000, "ms": 1_000, "us": 1}
"""Microseconds in each unit of Arrow that reaches beyond the range; nanoseconds do not."""


def to_micros(moment: datetime) -> int:
    """Microseconds since 1970 of an aware datetime."""
    return (moment - _EPOCH) // _MICROSECOND


def to_datetime(micros: int) -> datetime:
    """The datetime, in UTC, of microseconds since 1970; the nearest in the range if it is outside."""
    return _EPOCH + min(max(micros, FIRST_TIME), LAST_TIME) * _MICROSECOND


def time_before(now: int, age: int) -> int:
    """The time `age` before `now`, all in microseconds; the nearest int64 where a very long age leads beyond it."""
    return min(max(now - age, -(2**63)), 2**63 - 1)


def from_seconds(seconds: int) -> datetime | None:
    """The datetime, in UTC, of seconds since 1970; None if it is outside the range."""
    micros = 1_000_000 * seconds
    return to_datetime(micros) if FIRST_TIME <= micros <= LAST_TIME else None


def shown_time(micros: int) -> str:
    """A time as a message shows it, in ISO 8601, also where it is outside the range."""
    if not -(2**63) < micros < 2**63:
        return f"{micros} microseconds since 1970"
    return f"{np.datetime64(micros, 'us')}Z"


def outside_range(times: pa.Array) -> tuple[int, int] | None:
    """Find the first timestamp that is outside the range.

    Args:
        times: an array of timestamps in any unit; nulls are in range.

    Returns:
        Its position, and its value in microseconds since 1970; None if all are in the range.
    """
    micros = _UNITS.get(times.type.unit)
    if micros is None:
        return None
    numbers = times.view(pa.int64())
    first, last = -(-FIRST_TIME // micros), LAST_TIME // micros
    return _first_outside(numbers, first, last, micros)


def later_than(times: pa.Array, latest: datetime) -> tuple[int, int] | None:
    """As `outside_range` for timestamp[us]: the first that is later than `latest`."""
    return _first_outside(times.view(pa.int64()), -(2**63), to_micros(latest), 1)


def _first_outside(numbers: pa.Array, first: int, last: int, micros: int) -> tuple[int, int] | None:
    bounds = pc.min_max(numbers)
    least, most = bounds["min"].as_py(), bounds["max"].as_py()
    if least is None or (least >= first and most <= last):
        return None
    outside = pc.or_(pc.less(numbers, first), pc.greater(numbers, last))
    position: int = pc.index(outside, True).as_py()
    return position, micros * numbers[position].as_py()
