"""Step: compute, export and serve the next day's features while the ranking continues."""

import time

from pyspark.sql import SparkSession

from demo.client import Client, Load
from demo.features import FeatureJob
from demo.live import Probe, Watch, find_probe
from demo.ranker import Ranker
from demo.replay import export_day, table_of
from demo.setting import Setting, named, shipped
from demo.steps.ranking import check, show_ranking, told
from demo.terminal import plain_table
from shoal.engine.root.export_root import ExportRoot
from shoal.spark_export.report import Report

_PAUSE_SECONDS = 0.01
"""The pause between the requests of a client: Spark and the server share the cores."""


def update(setting: Setting, spark: SparkSession, port: int, client: Client, ranker: Ranker) -> None:
    """Export under load, and print how long each view's change took from published to served."""
    terminal = setting.terminal
    workspace = setting.workspace
    today = setting.calendar.live
    root = ExportRoot(workspace.root)
    terminal.heading(f"{named(today)} is over: its features are computed and exported while the ranking continues")
    before = client.lookup(ranker.request).version
    started = time.monotonic()
    with terminal.working("computing and exporting"), Load(port, ranker.score, pause=_PAUSE_SECONDS) as measured:
        FeatureJob(spark, workspace.source, setting.calendar.weeks).run([today], workspace.computed)
        computed = time.monotonic()
        probes = _probes(setting)
        with Watch(port, probes) as watch:
            reports = list(export_day(workspace, setting.views_file, today, root, spark))
            exported = time.monotonic()
            watch.wait()
    check(measured)
    after = client.lookup(ranker.request).version
    terminal.say(f"Spark computed in {computed - started:.1f} s and exported in {exported - computed:.1f} s.\n")
    waits = {
        report.view: watch.served_at[report.view] - root.entry(report.view, report.seq).published_at.timestamp()
        for report in reports
    }
    _show_views(setting, reports, probes, waits)
    terminal.say(
        f"\nThe store went from version {before} to {after}. Meanwhile two clients, with pauses of "
        f"{1000 * _PAUSE_SECONDS:.0f} ms, ranked {len(measured.seconds):,} times and saw {len(measured.versions)} "
        f"versions; {measured.failed} requests failed."
    )
    terminal.say(f"On the cores that Spark was using: {told(measured)}.")
    terminal.finding("published → served", f"{min(waits.values()):.3f} to {max(waits.values()):.3f} s")
    terminal.finding("ranking meanwhile", f"{told(measured)}, {measured.failed} failed")
    terminal.say(f"\nThe same departures, now with the features as of {named(today)}:\n")
    show_ranking(setting, ranker.rank(client))


def _probes(setting: Setting) -> list[Probe]:
    calendar = setting.calendar
    workspace = setting.workspace
    return [
        find_probe(
            view,
            table_of(workspace, view.name, calendar.replayed[-1]),
            table_of(workspace, view.name, calendar.live),
        )
        for view in setting.views_file.views
    ]


def _show_views(setting: Setting, reports: list[Report], probes: list[Probe], waits: dict[str, float]) -> None:
    columns = ("view", "seq", "rows shipped", "rows in all", "published → served", "seen by")
    table = plain_table(*columns, right=columns[2:5])
    for report, probe in zip(reports, probes, strict=True):
        key = "-".join(map(str, probe.key.values()))
        table.add_row(
            report.view,
            f"{report.seq - 1} → {report.seq}",
            f"{shipped(report):,}",
            f"{report.rows_read:,}",
            f"{waits[report.view]:.3f} s",
            f"{probe.reference} of {key}: {probe.before} → {probe.after}",
        )
    setting.terminal.show(table)
