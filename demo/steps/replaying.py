"""Step: compute the feature tables of some days, and export them: first a snapshot, then deltas."""

import statistics
import time

from pyspark.sql import SparkSession

from demo.features import FeatureJob
from demo.replay import export_day, table_of
from demo.setting import Setting, named, shipped
from shoal.engine.root.export_root import ExportRoot
from shoal.spark_export.report import Report

_WIDTHS = (13, 25, 22, 21, 23, 7)


def replay(setting: Setting, spark: SparkSession) -> None:
    """Compute all days at once, then export them one after the other."""
    terminal = setting.terminal
    workspace = setting.workspace
    days = setting.calendar.replayed
    views = [view.name for view in setting.views_file.views]
    terminal.heading(f"Features and exports: {len(days)} days, {named(days[0])} to {named(days[-1])}")
    started = time.monotonic()
    with terminal.working("computing features"):
        FeatureJob(spark, workspace.source, setting.calendar.weeks).run(days, workspace.computed)
    seconds = time.monotonic() - started
    rows = sum(table_of(workspace, view, day).num_rows for view in views for day in days)
    terminal.say(f"Spark computed {rows:,} rows of {len(views)} views, as of the end of each day, in {seconds:.1f} s.")
    terminal.finding("features computed", f"{rows:,} rows, {len(days)} days of {len(views)} views, in {seconds:.1f} s")
    terminal.say(f"Each day's tables then overwrote {workspace.features} and were exported to {workspace.root}:\n")
    _export_days(setting, spark, views)


def _export_days(setting: Setting, spark: SparkSession, views: list[str]) -> None:
    terminal = setting.terminal
    root = ExportRoot(setting.workspace.root)
    terminal.say(f"[bold]{_aligned('day', *views, 'seconds')}")
    deltas = []
    seconds = []
    for day in setting.calendar.replayed:
        started = time.monotonic()
        with terminal.working(f"exporting {named(day)}"):
            reports = list(export_day(setting.workspace, setting.views_file, day, root, spark))
        seconds.append(time.monotonic() - started)
        deltas += [report for report in reports if report.kind == "delta"]
        terminal.say(_aligned(f"{day:%a %d %b}", *map(_changes, reports), f"{seconds[-1]:.1f}"))
    terminal.finding("exports", f"{len(seconds)} days, {statistics.median(seconds):.1f} s a day (median)")
    if read := sum(delta.rows_read for delta in deltas):
        changed = sum(map(shipped, deltas))
        terminal.finding("shipped by deltas", f"{changed:,} of {read:,} rows ({changed / read:.0%})")


def _changes(report: Report) -> str:
    if report.kind is None:
        return "nothing"
    if report.kind == "snapshot":
        return f"snapshot, {report.rows_read:,} rows"
    removed = f", {report.removed} gone" if report.removed else ""
    return f"{shipped(report) - report.removed:,} of {report.rows_read:,}{removed}"


def _aligned(*cells: str) -> str:
    return "".join(f"{cell:<{width}}" for cell, width in zip(cells, _WIDTHS, strict=True)).rstrip()
