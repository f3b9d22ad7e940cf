"""Overlays stay few and small, and lookups return the same rows before and after a merge or a fold."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal import FeatureStore
from shoal.engine.format.catalog import SegmentRecord, ViewRecord
from shoal.engine.format.paths import generations_path
from shoal.engine.root.export_root import ExportRoot
from shoal.loaders.apply.compaction import (
    FOLD_LEAST_ROWS,
    MAX_OVERLAYS,
    TIER_GROWTH,
    fold,
    merge_overlays,
    overlays_to_merge,
    should_fold,
)
from shoal.loaders.apply.entries import apply_delta, load_snapshot, roll_back
from shoal.loaders.commit.store_writer import StoreWriter
from tests import stores

VIEW = stores.schema("doc", key="int64", a="int64", text="string")
KEYS = list(range(60))


def rows(value: int, *keys: int) -> list[stores.Row]:
    return [{"doc_id": key, "a": value, "text": f"{value}"} for key in keys]


@pytest.fixture
def root(tmp_path: Path) -> ExportRoot:
    root = ExportRoot(tmp_path / "root")
    stores.publish_snapshot(root, VIEW, rows(0, *range(40)))
    return root


@pytest.fixture
def writer(tmp_path: Path, root: ExportRoot) -> Iterator[StoreWriter]:
    stores.load(tmp_path / "store", root)
    with StoreWriter(tmp_path / "store") as writer:
        yield writer


def lay(writer: StoreWriter, root: ExportRoot, changed: list[stores.Row], dead: list[stores.Row] | None = None) -> None:
    """Apply a delta as an overlay, without the merge that normally follows."""
    apply_delta(writer, root, stores.publish_delta(root, VIEW, changed, dead or []))


def seen(writer: StoreWriter) -> list[int | None]:
    found = FeatureStore.open(writer.store).lookup(["doc:a", "doc:text"], {"doc_id": KEYS}).to_pydict()
    assert found["doc:text"] == [None if value is None else str(value) for value in found["doc:a"]]
    return found["doc:a"]


def state(writer: StoreWriter) -> ViewRecord:
    record = writer.record("doc")
    assert record
    return record


def overlays(*sizes: int) -> list[SegmentRecord]:
    return [SegmentRecord.model_construct(rows=size, tombstones=0) for size in sizes]


# --- which overlays are merged --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "count"),
    [
        ([], 0),
        ([5], 0),
        ([5, 5], 2),
        ([5, 20], 2),
        ([5, 21], 0),
        ([5, 20, 100], 3),
        ([5, 20, 101], 2),
        ([100, 5], 2),
        ([1, 10, 100, 1000, 10_000, 100_000], 0),
        ([1, 10, 100, 1000, 10_000, 100_000, 1_000_000], 2),
    ],
)
def test_an_overlay_is_merged_with_its_elders_until_they_are_much_larger(sizes: list[int], count: int) -> None:
    assert overlays_to_merge(overlays(*sizes)) == count


@given(st.lists(st.integers(1, 10**6), max_size=300))
def test_overlays_stay_few_whatever_the_sizes_of_deltas(sizes: list[int]) -> None:
    stack: list[int] = []
    written = 0
    for size in sizes:
        stack.insert(0, size)
        if count := overlays_to_merge(overlays(*stack)):
            written += sum(stack[:count])
            stack[:count] = [sum(stack[:count])]
        assert len(stack) <= MAX_OVERLAYS
    assert sum(stack) == sum(sizes)


def test_a_row_is_rewritten_about_once_a_tier() -> None:
    stack: list[int] = []
    written = 0
    for _ in range(1000):
        stack.insert(0, 1)
        if count := overlays_to_merge(overlays(*stack)):
            written += sum(stack[:count])
            stack[:count] = [sum(stack[:count])]
    assert written / 1000 < 3 * TIER_GROWTH * MAX_OVERLAYS


def test_overlays_are_folded_when_they_outgrow_their_share() -> None:
    def record(base: int, *sizes: int) -> ViewRecord:
        content: dict[str, Any] = {"base": overlays(base)[0], "overlays": tuple(overlays(*sizes))}
        return ViewRecord.model_construct(**content)

    assert not should_fold(record(100))
    assert not should_fold(record(0))
    assert not should_fold(record(100_000, 10_000, 15_000))
    assert should_fold(record(100_000, 10_000, 15_001))
    assert not should_fold(record(0, FOLD_LEAST_ROWS))
    assert should_fold(record(0, FOLD_LEAST_ROWS + 1))


# --- merges and folds do not change results -------------------------------------------------------------------


def test_merging_and_folding_change_nothing_that_is_seen(writer: StoreWriter, root: ExportRoot) -> None:
    lay(writer, root, rows(1, 1, 2, 3, 50))
    lay(writer, root, rows(2, 2, 51), rows(0, 3, 4, 50, 59))
    lay(writer, root, rows(3, 3, 5))
    expected = seen(writer)
    assert expected[:6] == [0, 1, 2, 3, None, 3]
    assert expected[50:52] == [None, 2]
    assert merge_overlays(writer, "doc")
    assert [(part.rows, part.tombstones) for part in state(writer).overlays] == [(5, 3)]
    assert seen(writer) == expected
    before = state(writer)
    assert fold(writer, "doc")
    after = state(writer)
    assert seen(writer) == expected
    assert after.overlays == ()
    assert (after.base.rows, after.base.tombstones) == (40, 0)
    assert (after.applied_seq, after.applied_entry) == (before.applied_seq, before.applied_entry)
    assert after.base.last_entry == before.applied_entry
    assert after.kept == (before.base,)
    assert [origin.seq for origin in after.base.origins] == [1, 2, 3, 4]
    lay(writer, root, rows(4, 4))
    assert seen(writer)[4] == 4


def test_overlays_that_come_while_a_fold_is_under_way_stay_over_it(writer: StoreWriter, root: ExportRoot) -> None:
    lay(writer, root, rows(1, 1, 2))
    lay(writer, root, rows(2, 2, 3))
    came = threading.Event()

    def meanwhile(_: int) -> None:
        if not came.is_set():
            came.set()
            lay(writer, root, rows(3, 3, 4))
            lay(writer, root, rows(4, 4, 5), rows(0, 6))
            assert merge_overlays(writer, "doc")
            assert len(state(writer).overlays) == 3
            lay(writer, root, rows(5, 5))

    assert fold(writer, "doc", meanwhile)
    assert came.is_set()
    assert [part.last_seq for part in state(writer).overlays] == [6, 5]
    assert state(writer).base.last_seq == 3
    assert seen(writer)[:8] == [0, 1, 2, 3, 4, 5, None, 0]
    assert writer.folding == {}


def test_a_fold_that_a_snapshot_overtook_is_dropped(writer: StoreWriter, root: ExportRoot) -> None:
    lay(writer, root, rows(1, 1, 2))

    def meanwhile(_: int) -> None:
        load_snapshot(writer, root, stores.publish_snapshot(root, VIEW, rows(9, *range(10))), lambda rows: None)

    assert not fold(writer, "doc", meanwhile)
    assert seen(writer)[:11] == [9] * 10 + [None]
    names = {path.name for path in generations_path(writer.store, "doc").iterdir()}
    assert names == {state(writer).base.id, state(writer).kept[0].id}


def test_a_fold_goes_on_while_a_snapshot_fails_to_load(writer: StoreWriter, root: ExportRoot) -> None:
    lay(writer, root, rows(1, 1, 2))

    def meanwhile(_: int) -> None:
        manifest = stores.publish_snapshot(root, VIEW, rows(9, *range(10)))
        (root.directory(manifest) / manifest.files[0].path).unlink()
        with pytest.raises(Exception, match="is missing"):
            load_snapshot(writer, root, manifest, lambda rows: None)

    assert fold(writer, "doc", meanwhile)
    assert seen(writer)[:4] == [0, 1, 1, 0]
    assert state(writer).overlays == ()


def test_a_fold_after_which_the_view_was_rolled_back_is_dropped(writer: StoreWriter, root: ExportRoot) -> None:
    lay(writer, root, rows(1, 1, 2))
    lay(writer, root, rows(2, 2))
    base = state(writer).base
    assert not fold(writer, "doc", lambda _: roll_back(writer, "doc", base.id))
    assert seen(writer)[:3] == [0, 0, 0]
    assert state(writer).base == base


def test_folding_again_and_again_keeps_what_was_published(writer: StoreWriter, root: ExportRoot) -> None:
    published = state(writer).base
    for value in range(1, 6):
        lay(writer, root, rows(value, value))
        assert fold(writer, "doc")
    assert state(writer).kept == (published,)
    names = {path.name for path in generations_path(writer.store, "doc").iterdir()}
    assert names == {state(writer).base.id, published.id}
    assert seen(writer)[:7] == [0, 1, 2, 3, 4, 5, 0]


def test_a_fold_of_everything_dead_has_no_rows(writer: StoreWriter, root: ExportRoot) -> None:
    lay(writer, root, [], rows(0, *range(40)))
    assert fold(writer, "doc")
    assert state(writer).base.rows == 0
    assert seen(writer) == [None] * 60
    lay(writer, root, rows(7, 7))
    assert fold(writer, "doc")
    assert seen(writer)[7] == 7


def test_many_deltas_in_a_row_leave_few_overlays(writer: StoreWriter, root: ExportRoot) -> None:
    expected = seen(writer)
    for value in range(1, 30):
        key = value * 7 % 60
        lay(writer, root, rows(value, key))
        expected[key] = value
        merge_overlays(writer, "doc")
        assert len(state(writer).overlays) <= MAX_OVERLAYS
    assert seen(writer) == expected
    assert fold(writer, "doc")
    assert seen(writer) == expected


def test_chunks_of_overlays_that_are_gone_leave_the_store(writer: StoreWriter, root: ExportRoot) -> None:
    for value in range(1, 10):
        lay(writer, root, rows(value, *range(value, value + 5)))
        merge_overlays(writer, "doc")
    live = writer._live
    with live.env.begin() as transaction:
        stored = {bytes(key).decode().rpartition("/")[0] for key, _ in transaction.cursor(db=live.segments)}
    assert stored == {part.id for part in state(writer).overlays}
    fold(writer, "doc")
    with live.env.begin() as transaction:
        assert transaction.stat(db=live.segments)["entries"] == 0
