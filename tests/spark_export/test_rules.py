"""The rules by which a row is shipped or not, one by one, where the random runs could pass them by."""

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from engine.manifest import EVENT_TIMESTAMP
from spark_export import shipment
from tests.spark_export.lab import KEY, NOW, TIMESTAMP, Lab, ago


def test_drift_within_the_tolerance_is_shipped_once_it_adds_up(lab: Lab) -> None:
    lab.define({"ctr": "float32", "n": "int64"}, tolerances={"ctr": 0.01, "n": 2})
    steps = [0.5, 0.506, 0.512, 0.518, 0.524]
    shipped = []
    for run, step in enumerate(steps):
        lab.put([{KEY: "a", "ctr": step, "n": 10, TIMESTAMP: ago(hours=9 - run)}])
        if lab.export().kind:
            shipped.append(step)
    # Each step is within 0.01 of the one before it, but what counts is the distance from what was shipped.
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


def test_an_event_time_alone_is_shipped_when_half_the_ttl_is_over(lab: Lab) -> None:
    lab.define({"n": "int64"}, ttl="4d")
    shipped = {"fresh": ago(days=1), "due": ago(days=3), "dead": ago(days=30), "due_but_still": ago(days=3)}
    lab.put([{KEY: key, "n": 1, TIMESTAMP: moment} for key, moment in shipped.items()])
    lab.export()
    moved = {key: ago(hours=1) for key in shipped} | {"due_but_still": ago(days=3)}
    lab.put([{KEY: key, "n": 1, TIMESTAMP: moment} for key, moment in moved.items()])
    report = lab.export()
    assert (report.kind, report.refreshed, report.unchanged) == ("delta", 2, 2)
    rows, _ = lab.published(lab.newest())
    assert {key: row[EVENT_TIMESTAMP] for key, row in rows.items()} == {("due",): ago(hours=1), ("dead",): ago(hours=1)}
    assert lab.export().kind is None


def test_a_late_row_waits_for_a_full_export(lab: Lab) -> None:
    lab.define({"n": "int64"})
    lab.put([{KEY: "a", "n": 1, TIMESTAMP: ago(hours=2)}, {KEY: "b", "n": 1, TIMESTAMP: ago(hours=2)}])
    lab.export()
    late = [{KEY: "a", "n": 2, TIMESTAMP: ago(hours=3)}, {KEY: "b", "n": 2, TIMESTAMP: ago(hours=2)}]
    lab.put(late)
    report = lab.export()
    # Of equal event times the later entry wins on a node, so that row is not late.
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
    # The same rows win when they are shipped as when they are judged.
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
    monkeypatch.setattr(shipment, "_BROADCAST_KEYS", 10)
    lab.define({"n": "int64"})
    for day in (2, 1):
        lab.put([{KEY: f"d{i}", "n": day, TIMESTAMP: ago(days=day)} for i in range(50)])
        lab.export()
    assert lab.newest().rows == 50
    assert {row["n"] for row in lab.served().values()} == {1}


def test_a_query_is_run_once(lab: Lab) -> None:
    # It gives other keys each time it runs, so what was judged would not be found again when it is shipped.
    query = "SELECT concat(id, ' at ', now()) AS doc_id, id AS n, current_timestamp() AS event_timestamp FROM range(50)"
    lab.define({"n": "int64"}, source={"sql": query}, max_removed="100%")
    lab.export()
    first = lab.served()
    report = lab.export()
    assert (report.new, report.removed) == (50, 50)
    assert len(first) == len(lab.served()) == 50
    assert not first.keys() & lab.served().keys()
    assert lab.newest().inputs == (f"sql {query}",)
