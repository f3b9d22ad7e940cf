"""Points in time as Spark takes them, exact to the microsecond, whatever time zone it is set to."""

from pyspark.sql import Column
from pyspark.sql import functions as F


def instant(micros: int) -> Column:
    """A timestamp, given as microseconds since the epoch."""
    return F.timestamp_micros(F.lit(micros))
