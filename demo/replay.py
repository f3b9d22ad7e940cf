"""The replay: each day's feature tables take the place of the day before's, and what changed is exported."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import SparkSession

from demo.features import AS_OF
from demo.source import weeks_since
from demo.workspace import Workspace
from engine.export_root import ExportRoot
from spark_export.exporter import export_each
from spark_export.report import Report
from spark_export.views import ViewsFile

_LAST_DAY = date(2013, 12, 22)
"""The Sunday before Christmas, after two weeks with snow in New York."""


@dataclass(frozen=True)
class Calendar:
    """The days of a replay, `weeks` later than they were."""

    weeks: int
    replayed: tuple[date, ...]
    """Published before anything is served: a snapshot, then deltas."""
    live: date
    """Published while the departures of `ranked`, the day after it, are being ranked."""
    ranked: date

    def in_2013(self, day: date) -> date:
        """What a day was in 2013, as the prepared source has it."""
        return day - timedelta(weeks=self.weeks)


def calendar(days: int) -> Calendar:
    """A replay of so many days that ends as close to today as weekdays allow."""
    weeks = weeks_since(_LAST_DAY)
    live = _LAST_DAY + timedelta(weeks=weeks)
    replayed = tuple(live - timedelta(days=number) for number in range(days, 0, -1))
    return Calendar(weeks, replayed, live, live + timedelta(days=1))


def export_day(
    workspace: Workspace, views_file: ViewsFile, day: date, root: ExportRoot, spark: SparkSession
) -> Iterator[Report]:
    """Overwrite the feature tables with those of a day, as a nightly job would, and export them."""
    for view in views_file.views:
        table = workspace.features / view.name
        shutil.rmtree(table, ignore_errors=True)
        shutil.copytree(_partition(workspace, view.name, day), table)
    return export_each(views_file, root, spark=spark)


def table_of(workspace: Workspace, view: str, day: date) -> pa.Table:
    """A view's feature table as of a day, read without Spark."""
    return pq.read_table(_partition(workspace, view, day), partitioning=None)


def _partition(workspace: Workspace, view: str, day: date) -> Path:
    return workspace.computed / view / f"{AS_OF}={day}"
