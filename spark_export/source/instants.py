"""Points in time for Spark, exact to the microsecond and independent of Spark's time zone setting."""

from pyspark.sql import Column
from pyspark.sql import functions as F


def instant(micros: int) -> Column:
    """Return a timestamp column with a constant value, given in microseconds since the epoch."""
    return F.timestamp_micros(F.lit(micros))
