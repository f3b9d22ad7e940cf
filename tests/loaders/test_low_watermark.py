"""Rows that their source confirms without a change do not expire or look old; all other rows do."""

import gc
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from shoal import FeatureStore
from shoal.engine.format.catalog import LowWatermark, Origin
from shoal.engine.kernels.gathering import Status
from shoal.engine.lookup.explain import explain
from shoal.engine.root.export_root import ExportRoot
from shoal.loaders.apply.compaction import fold, merge_overlays
from shoal.loaders.apply.entries import roll_back
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.follow.load import NullObserver, catch_up
from shoal.loaders.push.push import push_rows
from tests.damage import harm
from tests.stores import TIMESTAMP, Row, falsify, load, publish_delta, publish_snapshot, schema

VIEW = schema("doc", ttl=timedelta(days=2), n="int64", title="string")
NOW = datetime.now(UTC)
STREAM = {"query": "0" * 36, "batch": 1}
PRESENT, TOO_OLD, MISSING = "PRESENT", "OUTSIDE_MAX_AGE", "NOT_FOUND"


def ago(days: float) -> datetime:
    return NOW - timedelta(days=days)


def row(key: str, days: float, n: int = 0) -> Row:
    return {"doc_id": key, "n": n, "title": f"title of {key}", TIMESTAMP: ago(days)}


def statuses(store: Path, *keys: str, max_age: timedelta | None = None) -> list[str]:
    """Return the status of each key, after asserting that a lookup by column and a lookup by matrix agree."""
    opened = FeatureStore.open(store)
    answer = opened.lookup(["doc:n", "doc:title"], {"doc_id": keys}, max_age=max_age)
    matrix = opened.lookup_matrix(["doc:n"], {"doc_id": keys}, max_age=max_age)
    assert (matrix.views["doc"].status == answer.views["doc"].status).all()
    assert (matrix.views["doc"].event_time == answer.views["doc"].event_time).all()
    return [Status(status).name for status in answer.views["doc"].status]


@pytest.fixture
def root(tmp_path: Path) -> ExportRoot:
    """A root with rows that are a week old, except one that is older than the low watermark. Tests later confirm the
    rest."""
    root = ExportRoot(tmp_path / "root")
    rows = [*(row(f"d{i}", 7, n=i) for i in range(50)), row("behind", 9)]
    publish_snapshot(root, VIEW, rows, low_watermark=ago(7))
    return root


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def test_a_heartbeat_keeps_unchanged_rows_from_expiring(root: ExportRoot, store: Path) -> None:
    load(store, root)
    assert statuses(store, "d1", "behind", "none") == [TOO_OLD, TOO_OLD, MISSING]
    publish_delta(root, VIEW, [], low_watermark=ago(1), watermark=ago(1))
    load(store, root)
    assert statuses(store, "d1", "behind", "none") == [PRESENT, TOO_OLD, MISSING]
    # The caller's `max_age` uses the same rule, while the returned event time is the row's own.
    assert statuses(store, "d1", max_age=timedelta(hours=25)) == [PRESENT]
    assert statuses(store, "d1", max_age=timedelta(hours=23)) == [TOO_OLD]
    answer = FeatureStore.open(store).lookup(["doc:n"], {"doc_id": ["d1", "behind"]}, stale="serve")
    times = answer.views["doc"].event_time.astype("datetime64[us]").astype("datetime64[D]")
    assert times.tolist() == [ago(7).date(), ago(9).date()]


def test_rows_below_the_low_watermark_of_their_own_entry_have_their_own_age(root: ExportRoot, store: Path) -> None:
    load(store, root)
    publish_delta(root, VIEW, [row("d1", 6), row("d2", 3), row("backfilled", 365)], low_watermark=ago(4))
    publish_delta(root, VIEW, [], low_watermark=ago(1))
    load(store, root)
    assert statuses(store, "d1", "d2", "d3", "backfilled") == [TOO_OLD, PRESENT, PRESENT, TOO_OLD]
    # Once the source has caught up, it publishes the row again, and the row is judged like all others.
    publish_delta(root, VIEW, [row("d1", 1)], low_watermark=ago(1))
    publish_delta(root, VIEW, [], low_watermark=ago(0))
    load(store, root)
    assert statuses(store, "d1", max_age=timedelta(hours=1)) == [PRESENT]


def test_pushed_rows_and_rows_of_streams_have_their_own_age(root: ExportRoot, store: Path) -> None:
    load(store, root)
    publish_delta(root, VIEW, [row("d1", 6)], low_watermark=ago(7), stream=STREAM)
    publish_delta(root, VIEW, [], low_watermark=ago(1))
    load(store, root)
    with StoreWriter(store) as writer:
        push_rows(writer, "doc", {"doc_id": ["d2", "d3"], "n": [1, 2], TIMESTAMP: [ago(6), ago(0.5)]})
    assert statuses(store, "d1", "d2", "d3", "d4") == [TOO_OLD, TOO_OLD, PRESENT, PRESENT]
    # Rows are ordered by their own event times: an older row is superseded, even if the stored row only looks older.
    with StoreWriter(store) as writer:
        pushed = push_rows(writer, "doc", {"doc_id": ["d4", "behind"], "n": [9, 9], TIMESTAMP: [ago(6), ago(8)]})
        assert pushed.applied.superseded == 0
        pushed = push_rows(writer, "doc", {"doc_id": ["behind", "d5"], "n": [9, 9], TIMESTAMP: [ago(9), ago(8)]})
        assert pushed.applied.superseded == 2


def test_merges_and_folds_keep_the_age_of_rows(root: ExportRoot, store: Path) -> None:
    load(store, root)
    for number in range(4):
        publish_delta(root, VIEW, [row(f"d{number}", 6), row(f"d{number + 10}", 5)], low_watermark=ago(5.5))
    publish_delta(root, VIEW, [], low_watermark=ago(1))
    load(store, root)
    keys = ["d0", "d3", "d10", "d13", "d20", "behind"]
    expected = [TOO_OLD, TOO_OLD, PRESENT, PRESENT, PRESENT, TOO_OLD]
    assert statuses(store, *keys) == expected
    with StoreWriter(store) as writer:
        merge_overlays(writer, "doc")
        assert statuses(store, *keys) == expected
        assert fold(writer, "doc")
    assert statuses(store, *keys) == expected
    record = FeatureStore.open(store).version().view("doc").record
    assert record.overlays == ()
    assert record.base.low_watermark == record.low_watermark
    # A late row is late by its own event time, even for rows that have their own age.
    publish_delta(root, VIEW, [row("d0", 6.5, n=-1), row("d10", 4, n=-2)], low_watermark=ago(1))
    load(store, root)
    answer = FeatureStore.open(store).lookup(["doc:n"], {"doc_id": ["d0", "d10"]}, stale="serve")
    assert answer.to_pydict()["doc:n"] == [0, -2]


def test_a_rollback_restores_the_low_watermark(root: ExportRoot, store: Path) -> None:
    load(store, root)
    first = root.entry("doc", 1)
    publish_delta(root, VIEW, [], low_watermark=ago(1))
    publish_snapshot(root, VIEW, [row("d1", 1)], low_watermark=ago(0.5))
    load(store, root)
    assert _low_watermark(store) == LowWatermark(at=ago(0.5), set_by=_snapshot(root, 3))
    with StoreWriter(store) as writer:
        roll_back(writer, "doc", first.snapshot_id)
    assert _low_watermark(store) == LowWatermark(at=ago(7), set_by=_snapshot(root, 1))
    assert statuses(store, "d1") == [TOO_OLD]


def test_a_repair_restores_the_low_watermark(root: ExportRoot, store: Path) -> None:
    publish_delta(root, VIEW, [row("d1", 6), row("d2", 3)], low_watermark=ago(4))
    publish_delta(root, VIEW, [], low_watermark=ago(1))
    load(store, root)
    before = _low_watermark(store)
    gc.collect()
    for how in ("base missing", "overlay missing"):
        harm(store, "doc", how)
        load(store, root)
        assert _low_watermark(store) == before
        assert statuses(store, "d1", "d2", "d3", "behind") == [TOO_OLD, PRESENT, PRESENT, TOO_OLD]
        gc.collect()


def test_the_entry_that_set_the_low_watermark_is_known_and_stays(root: ExportRoot, store: Path) -> None:
    publish_delta(root, VIEW, [], low_watermark=ago(1))
    later = publish_delta(root, VIEW, [row("d1", 0.5)], low_watermark=root.entry("doc", 2).low_watermark)
    load(store, root)
    found = _low_watermark(store)
    assert found is not None
    assert (found.set_by.seq, found.at) == (2, later.low_watermark)
    version = FeatureStore.open(store).version()
    (newest, _), (of_behind,) = explain(store, version, "doc", {"doc_id": ["d1", "behind"]})
    assert (newest.own_age, of_behind.own_age) == (False, True)
    assert of_behind.event_time == ago(9)
    del version
    # A publisher without a low watermark, such as one of format 1, removes it, because what it shipped is unknown.
    falsify(root, publish_delta(root, VIEW, [row("d2", 0.5)]), format_version=1)
    load(store, root)
    assert _low_watermark(store) is None
    assert statuses(store, "d2", "d3") == [PRESENT, TOO_OLD]


def test_heartbeats_of_many_views_are_one_commit(tmp_path: Path, store: Path) -> None:
    root = ExportRoot(tmp_path / "root")
    names = [f"view{number}" for number in range(12)]
    views = [schema(name, n="int64") for name in names]
    for view in views:
        publish_snapshot(root, view, [{f"{view.name}_id": "a", "n": 1}], low_watermark=ago(7))
    load(store, root)
    before = FeatureStore.open(store).version().id
    gc.collect()
    for view in views:
        publish_delta(root, view, [], low_watermark=ago(1))
    with StoreWriter(store, gather_seconds=0.5) as writer, ThreadPoolExecutor(len(names)) as threads:
        list(threads.map(lambda name: catch_up(writer, root, name, NullObserver()), names))
        version = writer.version()
        assert version.id == before + 1
        assert {version.applied_seq(name) for name in names} == {2}


def _low_watermark(store: Path) -> LowWatermark | None:
    return FeatureStore.open(store).version().view("doc").record.low_watermark


def _snapshot(root: ExportRoot, seq: int) -> Origin:
    return Origin(kind="snapshot", seq=seq, id=root.entry("doc", seq).id)
