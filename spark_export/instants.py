"""Points in time between Python and Spark: exact to the microsecond, whatever time zone either is set to."""

from datetime import UTC, datetime, timedelta

from pyspark.sql import Column
from pyspark.sql import functions as F

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def to_micros(moment: datetime) -> int:
    """Microseconds since the epoch."""
    return (moment - _EPOCH) // _MICROSECOND


def from_micros(micros: int) -> datetime:
    """The point in time, in UTC, that lies so many microseconds after the epoch."""
    return _EPOCH + micros * _MICROSECOND


def instant(micros: int) -> Column:
    """A timestamp, given as microseconds since the epoch, as Spark takes it."""
    return F.timestamp_micros(F.lit(micros))
