"""The replay: each day's feature tables replace those of the day before, and the changes are exported."""

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
from shoal.engine.root.export_root import ExportRoot
from shoal.spark_export.exporter import export_each
from shoal.spark_export.report import Report
from shoal.spark_export.views.definition import ViewsFile

_LAST_DAY = date(2013, 12, 22)
"""The Sunday before Christmas, after two weeks with snow in New York."""


@dataclass(frozen=True)
class Calendar:
    """The days of a replay, moved by `weeks` weeks."""

    weeks: int
    replayed: tuple[date, ...]
    """The days that are published before the server starts: the first as a snapshot, the others as deltas."""
    live: date
    """The day that is published while the departures of the next day, `ranked`, are being ranked."""
    ranked: date

    def in_2013(self, day: date) -> date:
        """Return the original date of a day in 2013, as in the prepared source."""
        return day - timedelta(weeks=self.weeks)


def calendar(days: int) -> Calendar:
    """Return a replay of the given number of days. It ends as close to today as a move by whole weeks allows."""
    weeks = weeks_since(_LAST_DAY)
    live = _LAST_DAY + timedelta(weeks=weeks)
    replayed = tuple(live - timedelta(days=number) for number in range(days, 0, -1))
    return Calendar(weeks, replayed, live, live + timedelta(days=1))


def export_day(
    workspace: Workspace, views_file: ViewsFile, day: date, root: ExportRoot, spark: SparkSession
) -> Iterator[Report]:
    """Overwrite the feature tables with those of a day, as a nightly job would, and export them to the root."""
    for view in views_file.views:
        table = workspace.features / view.name
        shutil.rmtree(table, ignore_errors=True)
        shutil.copytree(_partition(workspace, view.name, day), table)
    return export_each(views_file, root, spark=spark)


def table_of(workspace: Workspace, view: str, day: date) -> pa.Table:
    """Read a view's feature table as of a day, without Spark."""
    return pq.read_table(_partition(workspace, view, day), partitioning=None)


def _partition(workspace: Workspace, view: str, day: date) -> Path:
    return workspace.computed / view / f"{AS_OF}={day}"
