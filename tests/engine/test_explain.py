"""The history of a key: every row that the store still holds, newest first, each with the entry that wrote it."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from shoal import FeatureStore
from shoal.engine.base.errors import LookupInvalid, UnknownFeature
from shoal.engine.format.catalog import Origin
from shoal.engine.lookup.explain import StoredRow, explain
from shoal.engine.root.export_root import ExportRoot
from shoal.loaders.apply.compaction import fold, merge_overlays
from shoal.loaders.apply.entries import apply_delta
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.follow.load import catch_up
from shoal.loaders.push.push import push_rows
from tests import stores

VIEW = stores.schema("doc", key="int64", a="int32", text="string")
TIME = datetime(2026, 1, 1, 12, 0, 0, 123457, tzinfo=UTC)


def rows(value: int, *keys: int) -> list[stores.Row]:
    at = TIME + timedelta(seconds=value)
    return [{"doc_id": key, "a": value, "text": f"t{value}", stores.TIMESTAMP: at} for key in keys]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with six entries: 1 and 4 are snapshots, the others are deltas. Every entry wrote key 1. The snapshots
    wrote key 2, and entry 5 removed it."""
    root = ExportRoot(tmp_path / "root")
    stores.publish_snapshot(root, VIEW, rows(1, 1, 2))
    with StoreWriter(tmp_path / "store") as writer:
        catch_up(writer, root, "doc", stores.NullObserver())
        for value in (2, 3):
            apply_delta(writer, root, stores.publish_delta(root, VIEW, rows(value, 1)))
        merge_overlays(writer, "doc")
        assert fold(writer, "doc")
        stores.publish_snapshot(root, VIEW, rows(4, 1, 2, 3))
        stores.publish_delta(root, VIEW, rows(5, 1), rows(5, 2))
        catch_up(writer, root, "doc", stores.NullObserver())
        apply_delta(writer, root, stores.publish_delta(root, VIEW, rows(6, 1)))
    return tmp_path / "store"


def origin(row: StoredRow) -> Origin:
    assert row.origin
    return row.origin


def history(store: Path, key: int) -> list[StoredRow]:
    (stored,) = explain(store, FeatureStore.open(store).version(), "doc", {"doc_id": key})
    return stored


def test_a_key_has_its_rows_newest_first(store: Path) -> None:
    found = [(row.place, origin(row).kind, origin(row).seq) for row in history(store, 1)]
    assert found == [
        ("overlay", "delta", 6),
        ("overlay", "delta", 5),
        ("base", "snapshot", 4),
        ("kept", "delta", 3),
        ("kept", "snapshot", 1),
    ]
    assert [row.values and row.values["a"] for row in history(store, 1)] == [6, 5, 4, 3, 1]
    assert history(store, 1)[0].values == {"a": 6, "text": "t6"}
    assert history(store, 1)[-1].event_time == TIME + timedelta(seconds=1)


def test_event_times_are_exact_however_far_away(tmp_path: Path) -> None:
    root = ExportRoot(tmp_path / "far")
    times = [datetime(1, 1, 1, 0, 0, 0, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)]
    view = VIEW.model_copy(update={"future": "allow"})
    stores.publish_snapshot(root, view, [{"doc_id": n, stores.TIMESTAMP: at} for n, at in enumerate(times)])
    stores.load(tmp_path / "store", root)
    assert [history(tmp_path / "store", n)[0].event_time for n in range(2)] == times


def test_a_key_that_was_removed_has_a_row_without_values(store: Path) -> None:
    first, *rest = history(store, 2)
    assert (first.place, first.values, origin(first).seq) == ("overlay", None, 5)
    assert [origin(row).seq for row in rest] == [4, 1, 1]


def test_a_key_that_never_was_has_no_rows(store: Path) -> None:
    assert history(store, 99) == []


def test_the_first_row_is_the_one_that_lookups_see(store: Path) -> None:
    reader = FeatureStore.open(store)
    keys = [1, 2, 3, 99]
    found = reader.lookup(["doc:a"], {"doc_id": keys}).to_pydict()["doc:a"]
    explained = explain(store, reader.version(), "doc", {"doc_id": keys})
    assert [rows[0].values["a"] if rows and rows[0].values else None for rows in explained] == found


def test_what_cannot_be_explained_is_told_as_for_lookups(store: Path) -> None:
    version = FeatureStore.open(store).version()
    with pytest.raises(UnknownFeature):
        explain(store, version, "nowhere", {"doc_id": 1})
    with pytest.raises(LookupInvalid):
        explain(store, version, "doc", {"doc_id": "1"})


def test_a_pushed_row_comes_from_no_entry(store: Path) -> None:
    with StoreWriter(store) as writer:
        push_rows(writer, "doc", {"doc_id": [1], "a": [9]})
    first, *rest = history(store, 1)
    assert (first.place, first.origin, first.values) == ("overlay", None, {"a": 9, "text": "t6"})
    assert rest
    assert all(row.origin for row in rest)
