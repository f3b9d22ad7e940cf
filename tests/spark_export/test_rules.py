"""The rules for shipping a row, one by one, for cases that the random runs might miss."""

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from shoal.engine.root.export_root import ExportRoot
from shoal.engine.root.manifest import EVENT_TIMESTAMP
from shoal.spark_export.changes import entry_rows
from shoal.spark_export.exporter import export
from shoal.spark_export.report import Report
from tests.spark_export.lab import KEY, NOW, TIMESTAMP, Lab, ago
from tests.stores import falsify


def test_drift_within_the_tolerance_is_shipped_once_it_adds_up(lab: Lab) -> None:
    lab.define({"ctr": "float32", "n": "int64"}, tolerances={"ctr": 0.01, "n": 2})
    steps = [0.5, 0.506, 0.512, 0.518, 0.524]
    shipped = []
    for run, step in enumerate(steps):
        lab.put([{KEY: "a", "ctr": step, "n": 10, TIMESTAMP: ago(hours=9 - run)}])
        if lab.export().bytes:
            shipped.append(step)
    # Each step is within 0.01 of the previous one, but the distance from the last shipped value counts.
    assert shipped == [0.5, 0.512, 0.524]
    assert lab.served()[("a",)]["ctr"] == np.float32(0.524)


def test_a_tolerance_of_integers_is_exact_where_doubles_are_not(lab: Lab) -> None:
    lab.define({"n": "int64"}, tolerances={"n": 1})
    big = 2**62
    before = {"same": big, "near": big, "far": big, "overflow": 2**63 - 1, "lowest": 0}
    after = {"same": big, "near": big + 1, "far": big + 2, "overflow": -2, "lowest": -(2**63)}
    lab.put([{KEY: key, "n": n, TIMESTAMP: NOW} for key, n in before.items()])
    lab.export()
    lab.put([{KEY: key, "n": n, TIMESTAMP: NOW} for key, n in after.items()])
    lab.export()
    assert set(lab.published(lab.newest())[0]) == {("far",), ("overflow",), ("lowest",)}


def test_an_event_time_alone_is_shipped_before_the_ttl_ends(lab: Lab) -> None:
    lab.define({"n": "int64"}, ttl="4d")
    shipped = {"fresh": ago(days=1), "due": ago(days=3), "dead": ago(days=30), "due_but_still": ago(days=3)}
    lab.put([{KEY: key, "n": 1, TIMESTAMP: moment} for key, moment in shipped.items()])
    lab.export()
    # The recorded runs are at most a day apart, so rows that expire within two days are shipped.
    falsify(lab.root, lab.newest(), recent_runs=[ago(days=day).isoformat() for day in (3, 2.5, 1.5, 1)])
    moved = {key: ago(hours=1) for key in shipped} | {"due_but_still": ago(days=3)}
    lab.put([{KEY: key, "n": 1, TIMESTAMP: moment} for key, moment in moved.items()])
    report = lab.export()
    assert (report.kind, report.refreshed, report.unchanged) == ("delta", 2, 2)
    rows, _ = lab.published(lab.newest())
    assert {key: row[EVENT_TIMESTAMP] for key, row in rows.items()} == {("due",): ago(hours=1), ("dead",): ago(hours=1)}
    assert lab.export().kind is None


def test_rows_that_the_source_confirms_without_a_change_get_no_older(lab: Lab) -> None:
    lab.define({"n": "int64"}, ttl="2d")

    def run(batch: datetime, straggler: datetime, *more: dict[str, Any]) -> Report:
        rows = [{KEY: f"d{i}", "n": i, TIMESTAMP: batch} for i in range(300)]
        lab.put([*rows, {KEY: "straggler", "n": 0, TIMESTAMP: straggler}, *more])
        report = lab.export()
        assert lab.newest().low_watermark == batch
        return report

    days = [ago(days=day) for day in (4, 3, 2, 1, 0)]
    assert run(days[0], days[0]).kind == "snapshot"
    # Only the straggler is shipped, because nodes must not judge its age by the other rows.
    report = run(days[1], days[0])
    assert (report.kind, report.refreshed, report.unchanged) == ("delta", 1, 300)
    report = run(days[2], days[0])
    assert (report.kind, report.refreshed, report.reason) == ("delta", 0, "no row changed, the source is newer")
    assert (lab.newest().files, lab.newest().watermark) == ((), days[2])
    assert lab.judged_by()["straggler",] == (days[0], days[0])
    assert lab.judged_by()["d7",] == (days[0], days[2])
    report = run(days[3], days[3])
    assert (report.refreshed, report.unchanged) == (1, 300)
    assert lab.judged_by()["straggler",] == (days[3], days[3])
    # A row of last year makes no other row older.
    report = run(days[3], days[3], {KEY: "last year", "n": 1, TIMESTAMP: ago(days=365)})
    assert (report.new, report.refreshed) == (1, 0)
    assert lab.judged_by()["d7",] == (days[0], days[3])
    assert lab.judged_by()["last year",][1] < ago(days=364)
    assert lab.export().kind is None


def test_a_format_without_a_low_watermark_begins_with_a_snapshot(lab: Lab) -> None:
    lab.define({"n": "int64"}, ttl="4d")
    lab.put([{KEY: "a", "n": 1, TIMESTAMP: ago(days=3)}])
    lab.export()
    older = ExportRoot(lab.root.path, write_format=1)
    (report,) = export(lab.views(), older, spark=lab.spark)
    assert (report.kind, report.reason) == ("snapshot", "the format went back from 2 to 1")
    assert (lab.newest().format_version, lab.newest().low_watermark) == (1, None)
    (report,) = export(lab.views(), older, spark=lab.spark)
    assert report.kind is None
    report = lab.export()
    assert (report.kind, report.reason, lab.newest().rows) == ("delta", "no row changed, the source is newer", 0)


def test_a_late_row_waits_for_a_full_export(lab: Lab) -> None:
    lab.define({"n": "int64"})
    lab.put([{KEY: "a", "n": 1, TIMESTAMP: ago(hours=2)}, {KEY: "b", "n": 1, TIMESTAMP: ago(hours=2)}])
    lab.export()
    late = [{KEY: "a", "n": 2, TIMESTAMP: ago(hours=3)}, {KEY: "b", "n": 2, TIMESTAMP: ago(hours=2)}]
    lab.put(late)
    report = lab.export()
    # With equal event times, the later entry wins on a node, so that row is not late.
    assert (report.late, report.changed) == (1, 1)
    report = lab.export()
    assert (report.kind, report.late) == (None, 1)
    lab.export(full=True)
    assert lab.served()[("a",)]["n"] == 2


def test_a_vanished_key_is_remembered_against_rows_older_than_its_tombstone(lab: Lab) -> None:
    lab.define({"n": "int64"})
    stays = {KEY: "stays", "n": 1, TIMESTAMP: NOW}
    lab.put([stays, {KEY: "a", "n": 1, TIMESTAMP: ago(hours=2)}])
    lab.export()
    lab.put([stays])
    assert lab.export().removed == 1
    assert lab.export().kind is None
    lab.put([stays, {KEY: "a", "n": 1, TIMESTAMP: ago(hours=3)}])
    report = lab.export()
    assert (report.kind, report.late) == (None, 1)
    lab.put([stays, {KEY: "a", "n": 1, TIMESTAMP: ago(hours=2)}])
    report = lab.export()
    assert (report.kind, report.new) == ("delta", 1)
    assert ("a",) in lab.served()


def test_the_newest_duplicate_wins_whatever_the_order_of_the_rows(lab: Lab) -> None:
    lab.define({"n": "int64", "ctr": "float32"}, tolerances={"ctr": 0.1})
    older = [{KEY: "a", "n": n, "ctr": 0.0, TIMESTAMP: ago(hours=2)} for n in range(3)]
    tied: list[dict[str, Any]] = [{KEY: "a", "n": n, "ctr": n / 2, TIMESTAMP: ago(hours=1)} for n in (7, 8, 8, 9)]
    tied.append(tied[0] | {"ctr": 100.0})
    lab.put([*older, *tied])
    report = lab.export()
    assert (report.rows_read, report.duplicates, report.new) == (8, 7, 1)
    winner = lab.served()
    lab.put([*reversed(tied), *older])
    report = lab.export()
    assert (report.kind, report.duplicates, report.unchanged) == (None, 7, 1)
    # The same duplicate wins in a full export and in the comparison.
    lab.export(full=True)
    assert lab.served() == winner


def test_without_a_timestamp_field_a_row_is_as_old_as_the_run_that_ships_it(lab: Lab) -> None:
    lab.define({"n": "int64"}, timestamp_field=None, ttl="4d")
    started = datetime.now(UTC)
    lab.put([{KEY: "a", "n": 1}, {KEY: "b", "n": 1}])
    lab.export()
    first = {key: row[EVENT_TIMESTAMP] for key, row in lab.served().items()}
    assert started <= first[("a",)] == first[("b",)] <= datetime.now(UTC)
    lab.put([{KEY: "a", "n": 1}, {KEY: "b", "n": 2}])
    report = lab.export()
    assert (report.changed, report.unchanged) == (1, 1)
    second = {key: row[EVENT_TIMESTAMP] for key, row in lab.served().items()}
    assert second[("a",)] == first[("a",)]
    assert second[("b",)] > first[("b",)]
    assert lab.newest().watermark == second[("b",)]


def test_more_changed_keys_than_are_sent_around_are_joined(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry_rows, "_BROADCAST_KEYS", 10)
    lab.define({"n": "int64"})
    for day in (2, 1):
        lab.put([{KEY: f"d{i}", "n": day, TIMESTAMP: ago(days=day)} for i in range(50)])
        lab.export()
    assert lab.newest().rows == 50
    assert {row["n"] for row in lab.served().values()} == {1}


def test_a_query_is_run_once(lab: Lab) -> None:
    # The query returns other keys each time, so a second run of it would not find the rows of the first run.
    query = "SELECT concat(id, ' at ', now()) AS doc_id, id AS n, current_timestamp() AS event_timestamp FROM range(50)"
    lab.define({"n": "int64"}, source={"sql": query}, max_removed="100%")
    lab.export()
    first = lab.served()
    report = lab.export(allow_removals=True)
    assert (report.new, report.removed) == (50, 50)
    assert len(first) == len(lab.served()) == 50
    assert not first.keys() & lab.served().keys()
    assert lab.newest().inputs == (f"sql {query}",)
