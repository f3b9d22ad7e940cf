"""The feature job: compute the tables of views.yaml as of the end of given days, all days of a view in one pass.

A row uses only events up to the end of its day in New York. A departure counts on the day of its actual departure. Its
delay at the destination may not be known at midnight, so the delay counts only from the next day on.
"""

from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from demo import source
from demo.source import NEW_YORK

AS_OF = "as_of"
_AGE = "age"
_MONTH = 28
_PLANE_KEPT_DAYS = 60
_LAST_ORIGINS = 5
_LATE_MINUTES = 15
_HOURS_A_BUCKET = 3


class FeatureJob:
    """Computes feature tables from the source tables, with all dates moved by `weeks` weeks from 2013."""

    def __init__(self, spark: SparkSession, source_directory: Path, weeks: int) -> None:
        self._spark = spark
        self._source = source_directory
        self._weeks = weeks

    def run(self, days: Sequence[date], target: Path) -> None:
        """Write each view's rows as of the end of each day to `<target>/<view>/as_of=<day>/`."""
        moments = [(day, self._end_of(day)) for day in days]
        as_of = F.broadcast(self._spark.createDataFrame(moments, f"{AS_OF} date, as_of_timestamp timestamp"))
        for view, table in _TABLES.items():
            rows = table(self, as_of).repartition(AS_OF).sortWithinPartitions(AS_OF)
            writer = rows.write.mode("overwrite").option("partitionOverwriteMode", "dynamic")
            writer.partitionBy(AS_OF).parquet(f"file://{(target / view).absolute()}")

    def planes(self, as_of: DataFrame) -> DataFrame:
        """Compute one row per plane that departed in the last 60 days."""
        flights = self._flights(as_of, _PLANE_KEPT_DAYS).where("tailnum IS NOT NULL")
        buckets = [_mean(_within(_MONTH) & _in_bucket(number)) for number in range(24 // _HOURS_A_BUCKET)]
        latest = F.sort_array(F.collect_list(F.when(_departed(_MONTH), F.struct("event_timestamp", "origin"))), False)
        behaviour = flights.groupBy(AS_OF, "tailnum").agg(
            _departures(1).alias("departures_1d"),
            _departures(7).alias("departures_7d"),
            _departures(_MONTH).alias("departures_28d"),
            _cancellations(_MONTH).alias("cancellations_28d"),
            _mean(_within(7)).alias("delay_mean_7d"),
            _mean(_within(_MONTH)).alias("delay_mean_28d"),
            _p90(7).alias("delay_p90_7d"),
            _p90(_MONTH).alias("delay_p90_28d"),
            F.coalesce(F.sum(F.when(_departed(_MONTH), F.col("distance"))), F.lit(0)).alias("distance_28d"),
            F.max(F.when(~F.col("cancelled"), F.col("event_timestamp"))).alias("last_seen"),
            F.slice(latest, 1, _LAST_ORIGINS)["origin"].alias("last_origins"),
            F.array([F.coalesce(bucket, F.lit(0.0).cast("float")) for bucket in buckets]).alias("delay_by_hour"),
        )
        registry = self._table("planes").select("tailnum", "manufacturer", "model", "engine", "year", "seats")
        return behaviour.where("last_seen IS NOT NULL").join(F.broadcast(registry), "tailnum", "left")

    def routes(self, as_of: DataFrame) -> DataFrame:
        """Compute one row per pair of airports with a scheduled departure between them in the last 28 days."""
        return (
            self._flights(as_of, _MONTH)
            .groupBy(AS_OF, "as_of_timestamp", "origin", "dest")
            .agg(
                F.max("distance").alias("distance"),
                F.count_distinct("carrier").cast("int").alias("carriers_28d"),
                _departures(7).alias("departures_7d"),
                _departures(_MONTH).alias("departures_28d"),
                _cancellations(7).alias("cancellations_7d"),
                _mean(_within(1)).alias("delay_mean_1d"),
                _mean(_within(7)).alias("delay_mean_7d"),
                _mean(_within(_MONTH)).alias("delay_mean_28d"),
                _p90(_MONTH).alias("delay_p90_28d"),
                F.avg((F.col("dep_delay") > _LATE_MINUTES).cast("int")).cast("float").alias("share_late_28d"),
                F.avg(F.when(_arrived(_MONTH), F.col("air_time"))).cast("float").alias("air_time_mean_28d"),
            )
        )

    def carriers(self, as_of: DataFrame) -> DataFrame:
        """Compute one row per airline with scheduled departures in the last 28 days."""
        behaviour = (
            self._flights(as_of, _MONTH)
            .groupBy(AS_OF, "as_of_timestamp", "carrier")
            .agg(
                F.count_distinct("tailnum").cast("int").alias("planes_28d"),
                _departures(7).alias("departures_7d"),
                _cancellations(7).alias("cancellations_7d"),
                _mean(_within(1)).alias("delay_mean_1d"),
                _mean(_within(7)).alias("delay_mean_7d"),
                _mean(_within(_MONTH)).alias("delay_mean_28d"),
                _p90(7).alias("delay_p90_7d"),
            )
        )
        return behaviour.join(F.broadcast(self._table("airlines")), "carrier", "left")

    def airports(self, as_of: DataFrame) -> DataFrame:
        """Compute one row per airport. Departures and weather are known only for New York's three airports."""
        flights = self._flights(as_of, 8)
        departures = flights.groupBy(AS_OF, F.col("origin").alias("faa")).agg(
            _departures(1).alias("departures_1d"),
            _mean(_within(1)).alias("delay_mean_1d"),
            _mean(_within(7)).alias("delay_mean_7d"),
        )
        arrivals = flights.groupBy(AS_OF, F.col("dest").alias("faa")).agg(
            F.count_if(_arrived(8)).alias("arrivals_7d"),
            F.avg(F.when(_arrived(8), F.col("arr_delay"))).cast("float").alias("arrival_delay_mean_7d"),
        )
        weather = self._table("weather").withColumnRenamed("day", AS_OF).groupBy(AS_OF, "faa").agg(
            F.avg("temp").cast("float").alias("temperature_mean"),
            F.max("wind_speed").cast("float").alias("wind_speed_max"),
            F.max("wind_gust").cast("float").alias("wind_gust_max"),
            F.sum("precip").cast("float").alias("precipitation"),
            F.min("pressure").cast("float").alias("pressure_min"),
            F.min("visib").cast("float").alias("visibility_min"),
        )  # fmt: skip
        named = self._table("airports").withColumnRenamed("alt", "altitude")
        known = named.select("faa").union(arrivals.select("faa")).distinct()
        rows = known.join(named, "faa", "left").crossJoin(as_of)
        for part in (departures, arrivals, weather):
            rows = rows.join(part, [AS_OF, "faa"], "left")
        return rows.fillna(0, ["departures_1d", "arrivals_7d"])

    def _end_of(self, day: date) -> datetime:
        """Return the last moment of a day in New York. Daylight saving time begins and ends on its dates of 2013."""
        moved = timedelta(weeks=self._weeks)
        return datetime.combine(day - moved, time.max, ZoneInfo(NEW_YORK)).astimezone(UTC) + moved

    def _table(self, name: str) -> DataFrame:
        return source.read(self._spark, self._source, name, self._weeks)

    def _flights(self, as_of: DataFrame, days: int) -> DataFrame:
        """Return, for each day in `as_of`, the flights of that day and of the `days` - 1 days before it. The column
        `age` is the age of a flight in days: 0 on the day itself."""
        flights = self._table("flights")
        age = F.date_diff(as_of[AS_OF], flights["day"])
        return flights.join(as_of, age.between(0, days - 1)).withColumn(_AGE, F.date_diff(AS_OF, "day"))


_TABLES: dict[str, Callable[[FeatureJob, DataFrame], DataFrame]] = {
    "planes": FeatureJob.planes,
    "routes": FeatureJob.routes,
    "carriers": FeatureJob.carriers,
    "airports": FeatureJob.airports,
}


def _within(days: int) -> Column:
    return F.col(_AGE) < days


def _departed(days: int) -> Column:
    return _within(days) & ~F.col("cancelled")


def _arrived(days: int) -> Column:
    return F.col(_AGE).between(1, days - 1) & F.col("arr_delay").isNotNull()


def _in_bucket(number: int) -> Column:
    return F.floor(F.col("hour") / _HOURS_A_BUCKET) == number


def _departures(days: int) -> Column:
    return F.count_if(_departed(days))


def _cancellations(days: int) -> Column:
    return F.count_if(_within(days) & F.col("cancelled"))


def _mean(which: Column) -> Column:
    """Return the mean delay in minutes, as a float; null without departures.

    The result does not depend on the order of rows, because sums of whole minutes are exact.
    """
    return F.avg(F.when(which, F.col("dep_delay"))).cast("float")


def _p90(days: int) -> Column:
    return F.percentile(F.when(_within(days), F.col("dep_delay")), 0.9).cast("float")
