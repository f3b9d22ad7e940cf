"""When a full snapshot is published, and that later runs need only its state."""

import shutil

import pytest

from shoal.engine.base.errors import SchemaChangeRefused
from tests.spark_export.lab import KEY, TIMESTAMP, VIEW, Lab, Row, ago

ROWS: list[Row] = [{KEY: f"d{i}", "n": i, "x": i / 2, TIMESTAMP: ago(hours=9)} for i in range(20)]


def test_later_runs_read_the_state_and_nothing_else_that_was_published(lab: Lab) -> None:
    lab.define({"n": "int64", "x": "float32"}, tolerances={"x": 0.1})
    lab.put(ROWS)
    assert lab.export().reason == "first export"
    for file in lab.root.path.rglob("part-*.parquet"):
        if "state" not in file.parts:
            file.unlink()
    changed = ROWS[3] | {"n": 100, TIMESTAMP: ago(hours=1)}
    near = ROWS[4] | {"x": 2.05, TIMESTAMP: ago(hours=1)}
    lab.put([changed, near, *ROWS[5:]])
    report = lab.export()
    assert (report.kind, report.changed, report.removed, report.unchanged) == ("delta", 1, 3, 16)
    assert set(lab.published(lab.newest())[0]) == {("d3",)}


def test_a_full_export_takes_the_next_seq(lab: Lab) -> None:
    lab.define({"n": "int64", "x": "float32"})
    lab.put(ROWS)
    lab.export()
    lab.put(ROWS[1:])
    report = lab.export(full=True)
    assert (report.seq, report.kind, report.reason, report.new, report.removed) == (2, "snapshot", "requested", 19, 0)
    assert [lab.root.entry(VIEW, seq).kind for seq in lab.seqs()] == ["snapshot", "snapshot"]
    assert lab.newest().parent == lab.root.entry(VIEW, 1).id
    assert lab.root.newest_snapshot(VIEW) == lab.newest()
    assert len(lab.served()) == 19
    # The key that the snapshot left out counts as new when it comes back.
    lab.put(ROWS)
    report = lab.export()
    assert (report.seq, report.kind, report.new, report.unchanged) == (3, "delta", 1, 19)


def test_a_change_of_the_features_is_published_as_a_snapshot(lab: Lab) -> None:
    lab.define({"n": "int32"})
    lab.put(ROWS)
    lab.export()
    lab.define({"n": "int64", "x": "float32"})
    lab.put(ROWS)
    report = lab.export()
    assert (report.seq, report.kind, report.reason) == (2, "snapshot", "the features changed")
    assert lab.served()[("d3",)] | {"n": 3, "x": 1.5} == lab.served()[("d3",)]
    assert lab.export().kind is None
    lab.define({"n": "int64", "x": "float32"}, tier="dynamodb")
    report = lab.export()
    assert (report.seq, report.kind, report.reason) == (3, "snapshot", "the tier changed")
    lab.define({"n": "int64", "x": "float32"})
    assert lab.export().reason == "the tier changed"

    files = lab.files()
    lab.define({"n": "string", "x": "float32"})
    with pytest.raises(SchemaChangeRefused, match="feature 'n' changed from int64 to string"):
        lab.export(full=True)
    lab.define({"n": "int64", "x": "float32"}, keys={"other_id": "string"})
    with pytest.raises(SchemaChangeRefused, match="join keys changed from doc_id string to other_id string"):
        lab.export()
    assert lab.files() == files


def test_a_state_that_does_not_fit_is_told_and_replaced_by_a_snapshot(lab: Lab) -> None:
    lab.define({"n": "int64", "x": "float32"})
    lab.put(ROWS)
    lab.export()
    lab.define({"n": "int64", "x": "float32"}, tolerances={"x": 0.1})
    report = lab.export()
    assert (report.seq, report.kind, report.reason) == (2, "snapshot", "the tolerances changed")
    # The state does not depend on the size of a tolerance.
    lab.define({"n": "int64", "x": "float32"}, tolerances={"x": 0.2})
    assert lab.export().kind is None
    shutil.rmtree(lab.root.path / VIEW / "state")
    report = lab.export()
    assert (report.seq, report.kind, report.reason) == (3, "snapshot", "the state of seq 2 is missing")


def test_a_change_of_the_ttl_alone_reaches_the_nodes(lab: Lab) -> None:
    lab.define({"n": "int64", "x": "float32"}, ttl="30d")
    lab.put(ROWS)
    lab.export()
    lab.define({"n": "int64", "x": "float32"}, ttl="60d")
    report = lab.export()
    assert (report.seq, report.kind, report.reason, report.bytes) == (2, "delta", "the ttl changed", 0)
    newest = lab.newest()
    assert (newest.view.ttl, newest.rows, newest.files) == (lab.views().views[0].ttl, 0, ())
    assert lab.export().kind is None


def test_an_empty_source_is_a_view_without_rows(lab: Lab) -> None:
    lab.define({"n": "int64", "x": "float32"})
    lab.put([])
    report = lab.export()
    assert (report.kind, report.rows_read, report.bytes, lab.newest().watermark) == ("snapshot", 0, 0, None)
    lab.put(ROWS)
    assert lab.export().new == 20
    lab.put([])
    assert lab.export(allow_removals=True).removed == 20
    assert lab.served() == {}
