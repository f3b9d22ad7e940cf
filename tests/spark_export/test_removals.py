"""Exports that would remove too much of a view publish nothing, whatever they are compared with, in real Spark."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from shoal.engine.base.errors import RemovalRefused
from shoal.engine.root.export_root import ExportRoot
from shoal.spark_export.changes.guard import Loss
from shoal.spark_export.exporter import export, export_each
from shoal.spark_export.report import Report
from tests.spark_export.lab import KEY, TIMESTAMP, VIEW, Lab, Row, ago

ROWS: list[Row] = [{KEY: f"d{i}", "n": i, "x": i / 2, TIMESTAMP: ago(hours=9)} for i in range(1000)]
NAN = float("nan")


@pytest.fixture
def shipped(lab: Lab) -> Lab:
    """A lab with an exported view of 1,000 rows."""
    lab.define({"n": "int64", "x": "float32"})
    lab.put(ROWS)
    lab.export()
    return lab


def without(feature: str, rows: Sequence[Row], value: Any = None) -> list[Row]:
    """Return the rows with `value` for a feature, and with the event time of a second run."""
    return [row | {feature: value, TIMESTAMP: ago(hours=1)} for row in rows]


def refused(lab: Lab, rows: Sequence[Row], **options: Any) -> str:
    """Return why an export of these rows is refused, after asserting that the root is unchanged."""
    lab.put(rows)
    files = lab.files()
    with pytest.raises(RemovalRefused) as raised:
        lab.export(**options)
    assert raised.value.exit_code == 1
    assert lab.files() == files
    said = str(raised.value)
    assert said.startswith(f"view '{VIEW}': ")
    assert said.endswith(
        "; nothing was published for this view; correct the source, or, if the loss is intended, export once with "
        "--allow-removals, or set max_removed in views.yaml"
    )
    return said.removeprefix(f"view '{VIEW}': ").partition("; nothing was published")[0]


def test_a_delta_that_would_take_away_too_much_is_refused_and_the_next_good_one_follows(shipped: Lab) -> None:
    lab = shipped
    limit = "; limit: 20%)"
    assert refused(lab, []) == f"1,000 of 1,000 rows would be removed (100%{limit}"
    assert refused(lab, ROWS[:799]) == f"201 of 1,000 rows would be removed (20.1%{limit}"
    renamed = [row | {KEY: f"new {row[KEY]}"} for row in ROWS]
    assert refused(lab, renamed) == f"1,000 of 1,000 rows would be removed (100%{limit}"
    one_key = [row | {KEY: "d0"} for row in ROWS]
    assert refused(lab, one_key).startswith("999 of 1,000 rows would be removed")
    lost_n = f"1,000 of 1,000 values of feature 'n' would be lost (100%{limit}"
    lost_x = lost_n.replace("'n'", "'x'")
    assert refused(lab, without("n", ROWS)) == lost_n
    assert refused(lab, without("x", ROWS, NAN)) == lost_x
    assert refused(lab, without("n", without("x", ROWS))) == f"{lost_n}, {lost_x}"
    some = f"500 of 1,000 values of feature 'n' would be lost (50%{limit}"
    assert refused(lab, [*without("n", ROWS[:500]), *ROWS[500:]]) == some
    # New rows have values, and the values of removed rows do not count as lost.
    added = [row | {KEY: f"new {row[KEY]}"} for row in ROWS[:100]]
    some = f"300 of 1,000 values of feature 'n' would be lost (30%{limit}"
    assert refused(lab, [*ROWS[100:600], *without("n", ROWS[600:]), *added]) == some

    lab.put([*ROWS[200:800], *without("n", ROWS[800:])])
    report = lab.export()
    assert (report.kind, report.seq, report.removed, report.changed, report.unchanged) == ("delta", 2, 200, 200, 600)
    assert (report.refused, report.not_compared) == ((), ())
    assert (lab.newest().live_rows, lab.newest().values) == (800, {"n": 600, "x": 800})
    # A view with fewer than 1,000 rows may lose any number of them, but not all.
    assert refused(lab, []) == "800 of 800 rows would be removed (100%; limit: below 100%)"
    lab.put(ROWS[700:701])
    assert lab.export().removed == 799
    assert refused(lab, without("x", ROWS[700:701])).startswith("1 of 1 values of feature 'x' would be lost")
    lab.put([])
    assert lab.export(allow_removals=True).removed == 1
    assert (lab.newest().seq, lab.newest().live_rows, lab.served()) == (4, 0, {})


def test_rows_that_do_not_reach_the_nodes_neither_lose_nor_hide_values(shipped: Lab) -> None:
    lab = shipped
    older = [row | {"n": None, TIMESTAMP: ago(hours=20)} for row in ROWS]
    lab.put([*ROWS, *older])
    report = lab.export()
    assert (report.kind, report.duplicates, report.unchanged) == (None, 1000, 1000)
    lab.put(older)
    report = lab.export()
    assert (report.kind, report.late) == (None, 1000)
    # A delta still knows the values that were shipped, even if the state has late rows.
    lab.put([*older[1:], ROWS[0] | {"n": -1, TIMESTAMP: ago(hours=1)}])
    assert (lab.export().kind, lab.newest().live_rows, lab.newest().values) == ("delta", 1000, {"n": 1000, "x": 1000})
    assert refused(lab, without("n", ROWS)).startswith("1,000 of 1,000 values of feature 'n'")


def test_a_snapshot_for_whatever_reason_is_compared_with_what_was_published(shipped: Lab) -> None:
    lab = shipped
    features = {"n": "int64", "x": "float32"}
    everything = "1,000 of 1,000 rows would be removed (100%; limit: 20%)"
    assert refused(lab, [], full=True) == everything
    # Without a state to compare with, existing rows do not count as new.
    lab.put(ROWS[:700])
    report = next(export_each(lab.views(), lab.root, full=True, spark=lab.spark))
    assert (report.rows_read, report.new, report.removed, report.unchanged) == (700, 0, 300, 0)
    lab.define(features, tolerances={"x": 0.5})
    assert refused(lab, []) == everything
    lab.define(features, tier="dynamodb")
    assert refused(lab, []) == everything
    # An added feature has no values yet, and a removed feature does not count as lost.
    lab.define({"x": "float64", "added": "int64"})
    assert refused(lab, []) == everything
    assert refused(lab, without("x", ROWS, NAN)).startswith("1,000 of 1,000 values of feature 'x' would be lost (100%;")
    shutil.rmtree(lab.root.path / VIEW / "state")
    assert refused(lab, []) == everything
    assert refused(lab, [*ROWS[:799], ROWS[0]]).startswith("201 of 1,000 rows would be removed (20.1%;")
    lab.put([*ROWS[:800], *ROWS[:9]])
    report = lab.export()
    assert (report.kind, report.seq, report.new, report.duplicates, report.not_compared) == ("snapshot", 2, 800, 9, ())
    assert (lab.newest().live_rows, lab.newest().values) == (800, {"x": 800, "added": 0})


def test_a_view_has_a_limit_of_its_own(lab: Lab) -> None:
    lab.define({"n": "int64"}, max_removed="50%")
    lab.put(ROWS[:4])
    lab.export()
    assert refused(lab, ROWS[:1]) == "3 of 4 rows would be removed (75%; limit: 50%)"
    lab.put(ROWS[:2])
    assert lab.export().removed == 2
    lab.define({"n": "int64"}, max_removed=1)
    lab.put([])
    assert lab.export().removed == 2


def test_each_of_many_features_is_told_apart(lab: Lab) -> None:
    names = [f"f{number}" for number in range(66)]
    lab.define(dict.fromkeys(names, "int32"))
    rows = [{KEY: key, TIMESTAMP: ago(hours=2)} | dict.fromkeys(names, 1) for key in "ab"]
    lab.put(rows)
    lab.export()
    gone = {"f0", "f1", "f32", "f61", "f62", "f63", "f65"}
    said = refused(lab, [row | dict.fromkeys(gone) | {TIMESTAMP: ago(hours=1)} for row in rows])
    assert said.endswith(" and 2 more")
    assert {part.split("'")[1] for part in said.split(", ")} < gone
    lab.put([rows[0], rows[1] | dict.fromkeys(gone) | {TIMESTAMP: ago(hours=1)}])
    assert lab.export().changed == 1
    assert lab.newest().values == {name: 1 if name in gone else 2 for name in names}


def test_a_root_in_format_1_is_compared_by_its_state_or_its_last_snapshot(shipped: Lab) -> None:
    lab = shipped
    shutil.rmtree(lab.root.path)
    lab.root = ExportRoot(lab.root.path, write_format=1)
    lab.put(ROWS)
    lab.export()
    assert (lab.newest().live_rows, lab.newest().values) == (None, None)
    assert refused(lab, ROWS[:799]).startswith("201 of 1,000 rows")
    assert refused(lab, without("n", ROWS)).startswith("1,000 of 1,000 values of feature 'n'")
    lab.put(ROWS[100:])
    assert lab.export().removed == 100
    # The delta after the snapshot of 1,000 rows removed up to 100 rows.
    assert refused(lab, [], full=True).startswith("900 of 900 rows would be removed")
    lab.root = ExportRoot(lab.root.path)
    lab.put([*without("n", ROWS[100:101]), *ROWS[101:]])
    assert (lab.export().kind, lab.newest().live_rows, lab.newest().values) == ("delta", 900, {"n": 899, "x": 900})
    assert refused(lab, without("n", ROWS[100:]), full=True).startswith("899 of 899 values of feature 'n'")


def test_a_state_of_an_older_version_tells_rows_and_not_values(lab: Lab) -> None:
    lab.define({"n": "int64", "x": "float32"})
    lab.root = ExportRoot(lab.root.path, write_format=1)
    lab.put(ROWS)
    lab.export()
    for part in (lab.root.path / VIEW / "state").rglob("part-*.parquet"):
        _drop_bits(part)
    assert refused(lab, []).startswith("1,000 of 1,000 rows")
    lab.put(without("n", ROWS))
    report = lab.export()
    assert (report.changed, report.not_compared) == (1000, ("values",))
    lab.put(ROWS[:900])
    assert lab.export().not_compared == ()
    lab.put(ROWS)
    report = lab.export(full=True)
    assert report.not_compared == ("values",)


def _drop_bits(part: Path) -> None:
    """Rewrite a file of the state in the format of the previous version."""
    table = pq.read_table(part)
    part.unlink()
    (part.parent / f".{part.name}.crc").unlink(missing_ok=True)
    pq.write_table(table.drop_columns(["__values_0"]), part)


def test_a_refused_view_does_not_hold_up_the_others(shipped: Lab) -> None:
    lab = shipped
    other = """\
- name: others
  join_keys: [{name: doc_id, type: string}]
  features: [{name: n, type: int64}]
  timestamp_field: event_timestamp
  source: {sql: "SELECT doc_id, event_timestamp, n FROM others"}
services: [{name: ranker, features: ["docs:*"]}]
"""
    lab.views_path.write_text(lab.views_path.read_text() + other)
    lab.spark.createDataFrame([("a", 1)], "doc_id string, n bigint").selectExpr(
        "doc_id", "current_timestamp() AS event_timestamp", "n"
    ).createOrReplaceTempView("others")
    lab.put([])
    reports: list[Report] = []
    with pytest.raises(RemovalRefused, match=r"^view 'docs': 1,000 of 1,000 rows would be removed"):
        reports.extend(export_each(lab.views(), lab.root, spark=lab.spark))
    assert [(report.view, report.kind, report.seq) for report in reports] == [
        (VIEW, None, 1),
        ("others", "snapshot", 1),
    ]
    assert reports[0].refused == (Loss(None, 1000, 1000, 1.0, 0.2),)
    assert (reports[0].removed, reports[0].bytes, reports[1].refused) == (1000, 0, ())
    # Services may name features of a refused view, so they are not published yet.
    assert lab.root.services() == ()
    export(lab.views(), lab.root, allow_removals=True, spark=lab.spark)
    assert len(lab.root.services()) == 1
