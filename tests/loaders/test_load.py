"""Loading: each entry is applied once and completely, the newest row of each key wins, and a failure is reported and
affects only its own view."""

import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from shoal import FeatureStore
from shoal.engine.base.errors import (
    DeltaGap,
    FileDamaged,
    ForeignDelta,
    GenerationNotKept,
    NotPublished,
    SchemaChangeRefused,
    ShoalError,
)
from shoal.engine.format.paths import generations_path
from shoal.engine.format.schema import FeatureService
from shoal.engine.root.export_root import SERVICES, ExportRoot
from shoal.engine.root.manifest import Manifest
from shoal.loaders.apply.compaction import fold
from shoal.loaders.apply.entries import apply_delta, follow_again, roll_back
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.follow import load as loading
from shoal.loaders.follow.load import AppliedEntry, catch_up
from shoal.loaders.follow.plan import ApplyDelta, LoadSnapshot
from tests import stores
from tests.loaders.forgery import delta_table, publish, replaced

VIEW = stores.schema("doc", key="int64", a="int64")
KEYS = list(range(12))
MINUTE = timedelta(minutes=1)
NOW = stores.NOW


def rows(value: Any, *keys: int, minutes: int = 0) -> list[stores.Row]:
    return [{"doc_id": key, "a": value, stores.TIMESTAMP: NOW + minutes * MINUTE} for key in keys]


@pytest.fixture
def root(tmp_path: Path) -> ExportRoot:
    root = ExportRoot(tmp_path / "root")
    stores.publish_snapshot(root, VIEW, rows(0, *range(8)))
    return root


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def seen(store: Path, view: str = "doc", feature: str = "a") -> list[Any]:
    result = FeatureStore.open(store).lookup([f"{view}:{feature}"], {f"{view}_id": KEYS})
    found: list[Any] = result.to_pydict()[f"{view}:{feature}"]
    return found


def applied(store: Path, root: ExportRoot, **options: Any) -> list[tuple[str, str, int]]:
    return [(entry.view, entry.kind, entry.seq) for entry in stores.load(store, root, **options)]


def troubles(store: Path) -> dict[str, str]:
    return {view: trouble.code for view, trouble in FeatureStore.open(store).version().troubles.items()}


# --- each entry is applied once -------------------------------------------------------------------------------


def test_a_snapshot_and_its_deltas_are_applied_in_order(store: Path, root: ExportRoot) -> None:
    stores.publish_delta(root, VIEW, rows(1, 1, 2, 9))
    stores.publish_delta(root, VIEW, rows(2, 2), rows(0, 3, 9))
    assert applied(store, root) == [("doc", "snapshot", 1), ("doc", "delta", 2), ("doc", "delta", 3)]
    assert seen(store) == [0, 1, 2, None, 0, 0, 0, 0, None, None, None, None]


def test_what_was_applied_is_not_applied_again(store: Path, root: ExportRoot) -> None:
    stores.publish_delta(root, VIEW, rows(1, 1))
    applied(store, root)
    before = FeatureStore.open(store).version().id
    assert applied(store, root) == []
    assert FeatureStore.open(store).version().id == before
    stores.publish_delta(root, VIEW, rows(2, 2))
    assert applied(store, root) == [("doc", "delta", 3)]
    assert seen(store)[:4] == [0, 1, 2, 0]


def test_a_delta_that_a_view_has_moved_on_from_is_not_laid_over_it(store: Path, root: ExportRoot) -> None:
    applied(store, root)
    delta = stores.publish_delta(root, VIEW, rows(1, 1))
    with StoreWriter(store) as writer:
        apply_delta(writer, root, delta)
        before = writer.version().id
        with pytest.raises(ForeignDelta, match="view 'doc' moved on while delta 2 was being read"):
            apply_delta(writer, root, delta)
        assert writer.version().id == before


def test_what_was_applied_is_told(store: Path, root: ExportRoot) -> None:
    stores.publish_delta(root, VIEW, rows(1, 1, 2), rows(0, 3))
    told: list[Any] = []

    class Listener(stores.NullObserver):
        def started(self, step: LoadSnapshot | ApplyDelta) -> Callable[[int], None]:
            told.append((step.manifest.kind, step.manifest.seq))
            return told.append

        def finished(self, entry: AppliedEntry) -> None:
            told.append(entry)

    with StoreWriter(store) as writer:
        entries = loading.load(writer, root, Listener())
    snapshot, delta = entries
    assert (snapshot.rows, snapshot.tombstones, snapshot.reason) == (8, 0, "the store does not have the view yet")
    assert (delta.rows, delta.tombstones, delta.reason) == (2, 1, None)
    rows_told = [item for item in told if isinstance(item, int)]
    assert sum(rows_told) == 11
    assert [item for item in told if not isinstance(item, int)] == [
        ("snapshot", 1),
        snapshot,
        ("delta", 2),
        delta,
    ]


def test_only_the_views_named_are_loaded(store: Path, root: ExportRoot) -> None:
    stores.publish_snapshot(root, stores.schema("other", key="int64", a="int64"), [])
    assert applied(store, root, views=["other"]) == [("other", "snapshot", 1)]
    assert set(FeatureStore.open(store).version().views) == {"other"}
    with pytest.raises(NotPublished, match="has no view 'nowhere'; it has doc, other"):
        stores.load(store, root, views=["nowhere"])


def test_a_root_without_views_is_told(store: Path, tmp_path: Path) -> None:
    with pytest.raises(NotPublished, match="does not exist"):
        stores.load(store, ExportRoot(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotPublished, match="has no views"):
        stores.load(store, ExportRoot(tmp_path / "empty"))


# --- which row wins -------------------------------------------------------------------------------------------


def test_the_newest_event_time_wins_then_the_newest_entry(store: Path, root: ExportRoot) -> None:
    stores.publish_delta(root, VIEW, [*rows(1, 1, minutes=5), *rows(1, 2, minutes=-5), *rows(1, 3)])
    applied(store, root)
    assert seen(store)[:4] == [0, 1, 0, 1]
    stores.publish_delta(root, VIEW, [*rows(2, 1, minutes=4), *rows(2, 2, minutes=-4), *rows(2, 3), *rows(2, 9)])
    applied(store, root)
    assert seen(store)[:4] == [0, 1, 0, 2]
    assert seen(store)[9] == 2
    stores.publish_delta(root, VIEW, rows(None, 1, minutes=6))
    applied(store, root)
    assert seen(store)[1] is None


def test_a_tombstone_that_is_late_deletes_nothing(store: Path, root: ExportRoot) -> None:
    stores.publish_delta(root, VIEW, rows(1, 1, minutes=5), [*rows(0, 2, minutes=-1), *rows(0, 3, minutes=1)])
    applied(store, root)
    assert seen(store)[:4] == [0, 1, 0, None]


@pytest.mark.parametrize("merged", [False, True])
def test_a_key_comes_back_after_a_tombstone_whatever_its_event_time(
    store: Path, root: ExportRoot, merged: bool
) -> None:
    stores.publish_delta(root, VIEW, [], rows(0, 1, 2, minutes=10))
    applied(store, root)
    if merged:
        with StoreWriter(store) as writer:
            assert fold(writer, "doc")
    stores.publish_delta(root, VIEW, [*rows(5, 1, minutes=-5), *rows(6, 2, minutes=20)])
    applied(store, root)
    assert seen(store)[:3] == [0, 5, 6]


def test_a_delta_of_which_every_row_is_late_is_applied_all_the_same(store: Path, root: ExportRoot) -> None:
    stores.publish_delta(root, VIEW, rows(1, 1, 2, minutes=-1))
    applied(store, root)
    record = FeatureStore.open(store).version().view("doc").record
    assert (record.applied_seq, record.overlays) == (2, ())
    assert seen(store)[:3] == [0, 0, 0]


def test_an_empty_delta_moves_the_view_on(store: Path, root: ExportRoot) -> None:
    stores.publish_delta(root, VIEW, [])
    stores.publish_delta(root, VIEW, rows(1, 1))
    applied(store, root)
    record = FeatureStore.open(store).version().view("doc").record
    assert (record.applied_seq, len(record.overlays)) == (3, 1)
    assert seen(store)[:2] == [0, 1]


def test_a_view_without_rows_grows(store: Path, tmp_path: Path) -> None:
    root = ExportRoot(tmp_path / "empty")
    stores.publish_snapshot(root, VIEW, [])
    applied(store, root)
    assert seen(store) == [None] * 12
    stores.publish_delta(root, VIEW, rows(1, 1), rows(0, 2))
    applied(store, root)
    assert seen(store)[:3] == [None, 1, None]


def test_a_new_snapshot_replaces_everything(store: Path, root: ExportRoot) -> None:
    stores.publish_delta(root, VIEW, rows(1, 1, minutes=100))
    stores.publish_snapshot(root, VIEW, rows(7, 5, 6))
    applied(store, root)
    assert seen(store) == [None] * 5 + [7, 7] + [None] * 5


# --- schemas --------------------------------------------------------------------------------------------------


def test_features_come_go_and_widen_with_deltas(store: Path, tmp_path: Path) -> None:
    root = ExportRoot(tmp_path / "schemas")
    stores.publish_snapshot(
        root,
        stores.schema("doc", key="int64", a="int32", b="float32", c="string"),
        [{"doc_id": key, "a": key, "b": key / 4, "c": f"c{key}"} for key in range(4)],
    )
    stores.publish_delta(
        root,
        stores.schema("doc", key="int64", a="int64", b="float64", d="bool"),
        [{"doc_id": 1, "a": 2**40, "b": 0.1, "d": True}],
    )
    applied(store, root)
    assert seen(store, feature="a")[:4] == [0, 2**40, 2, 3]
    assert seen(store, feature="b")[:4] == [0.0, 0.1, 0.5, 0.75]
    assert seen(store, feature="d")[:4] == [None, True, None, None]
    with pytest.raises(ShoalError, match="has no feature 'c'"):
        seen(store, feature="c")


@pytest.mark.parametrize("kind", ["snapshot", "delta"])
def test_a_change_that_rows_cannot_follow_is_refused(store: Path, root: ExportRoot, kind: str) -> None:
    applied(store, root)
    narrowed = stores.schema("doc", key="int64", a="string")
    changed: list[stores.Row] = [{"doc_id": 1, "a": "x"}]
    if kind == "snapshot":
        stores.publish_snapshot(root, narrowed, changed)
    else:
        stores.publish_delta(root, narrowed, changed)
    with pytest.raises(SchemaChangeRefused, match="feature 'a' changed from int64 to string"):
        stores.load(store, root)
    assert seen(store)[:2] == [0, 0]
    assert troubles(store) == {"doc": "SchemaChangeRefused"}


def test_a_refused_snapshot_is_loaded_when_it_is_accepted(store: Path, root: ExportRoot) -> None:
    applied(store, root)
    stores.publish_snapshot(root, stores.schema("doc", a="string"), [{"doc_id": "1", "a": "x"}])
    with pytest.raises(SchemaChangeRefused, match="the join keys changed"):
        stores.load(store, root)
    assert applied(store, root, accept_schema_change=True) == [("doc", "snapshot", 2)]
    assert FeatureStore.open(store).lookup(["doc:a"], {"doc_id": "1"}).to_pydict() == {"doc:a": ["x"]}
    assert troubles(store) == {}


def test_a_ttl_may_come_with_an_empty_delta(store: Path, root: ExportRoot) -> None:
    stores.publish_delta(root, VIEW.model_copy(update={"ttl": MINUTE}), [])
    applied(store, root)
    assert seen(store) == [None] * 12


# --- large values ---------------------------------------------------------------------------------------------

TEXTS = stores.schema("text", key="int64", text="string", blob="bytes", words="list<string>")
LONGEST = (1 << 24) - 1


def test_the_longest_value_there_can_be_is_served(store: Path, tmp_path: Path) -> None:
    root = ExportRoot(tmp_path / "texts")
    words = ["a" * (LONGEST - 4 - 8 - 3), "bcd"]
    row = {"text_id": 1, "text": "x" * LONGEST, "blob": b"\1" * LONGEST, "words": words}
    stores.publish_snapshot(root, TEXTS, [row, {"text_id": 2, "text": "short"}])
    stores.load(store, root)
    found = FeatureStore.open(store).lookup(["text:*"], {"text_id": [1, 2]}).to_pydict()
    assert found["text:text"] == ["x" * LONGEST, "short"]
    assert found["text:blob"] == [b"\1" * LONGEST, None]
    assert found["text:words"] == [words, None]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("text", "x" * (LONGEST + 1)),
        ("blob", b"x" * (LONGEST + 1)),
        ("words", ["a" * (LONGEST - 4 - 8 - 2), "bcd"]),
    ],
)
def test_a_value_that_is_one_byte_longer_is_refused(store: Path, root: ExportRoot, name: str, value: Any) -> None:
    stores.publish_snapshot(root, TEXTS, [{"text_id": 1}])
    stores.load(store, root)
    stores.publish_delta(root, TEXTS, [{"text_id": 2, name: value}])
    with pytest.raises(
        FileDamaged, match=f"feature '{name}' has a value that does not fit its type .*: .* longer than 16777215 bytes"
    ):
        stores.load(store, root)
    assert FeatureStore.open(store).lookup(["text:text"], {"text_id": [2]}).to_pydict() == {"text:text": [None]}


# --- troubles -------------------------------------------------------------------------------------------------


def break_(root: ExportRoot, manifest: Manifest) -> Callable[[], None]:
    """Move an entry's file away, and return a function that puts it back."""
    path = root.directory(manifest) / manifest.files[0].path
    path.rename(path.with_suffix(".away"))
    return lambda: (path.with_suffix(".away").rename(path), None)[1]


def test_one_bad_view_does_not_hold_up_the_others(store: Path, root: ExportRoot) -> None:
    views = [stores.schema(name, key="int64", a="int64") for name in ("bad", "good", "worse")]
    manifests = [stores.publish_snapshot(root, view, [{f"{view.name}_id": 1, "a": 1}]) for view in views]
    mend = [break_(root, manifests[0]), break_(root, manifests[2])]
    with pytest.raises(FileDamaged, match="root/bad/"):
        stores.load(store, root)
    assert seen(store)[0] == 0
    assert seen(store, "good")[1] == 1
    assert troubles(store) == {"bad": "FileDamaged", "worse": "FileDamaged"}
    mend[0]()
    with pytest.raises(FileDamaged, match="root/worse/"):
        stores.load(store, root)
    assert troubles(store) == {"worse": "FileDamaged"}
    mend[1]()
    stores.load(store, root)
    assert troubles(store) == {}
    assert seen(store, "worse")[1] == 1


def test_a_view_of_which_arrow_cannot_make_anything_does_not_hold_up_the_others(store: Path, root: ExportRoot) -> None:
    applied(store, root)
    stores.publish_snapshot(root, stores.schema("zebra", key="int64", a="int64"), [{"zebra_id": 1, "a": 1}])
    table = delta_table(VIEW, rows(1, 1))
    too_fine = pa.array([1], pa.timestamp("ns", "UTC"))
    publish(root, VIEW, replaced(table, "__event_timestamp", too_fine))
    with pytest.raises(FileDamaged, match="would lose data"):
        stores.load(store, root)
    assert seen(store, "zebra")[1] == 1


def test_a_trouble_is_noted_since_it_began_and_told_anew_when_it_changes(store: Path, root: ExportRoot) -> None:
    applied(store, root)
    delta = stores.publish_delta(root, VIEW, rows(1, 1))
    mend = break_(root, delta)
    with pytest.raises(FileDamaged):
        stores.load(store, root)
    first = FeatureStore.open(store).version()
    with pytest.raises(FileDamaged):
        stores.load(store, root)
    assert FeatureStore.open(store).version().id == first.id
    mend()
    path = root.directory(delta) / delta.files[0].path
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(FileDamaged, match="is not readable as Parquet"):
        stores.load(store, root)
    second = FeatureStore.open(store).version().troubles["doc"]
    assert second.since == first.troubles["doc"].since
    assert second.message != first.troubles["doc"].message


def test_merging_and_folding_leave_a_trouble_noted(store: Path, root: ExportRoot) -> None:
    stores.publish_delta(root, VIEW, rows(1, 1, 2, 3, 4))
    break_(root, stores.publish_delta(root, VIEW, rows(2, 1)))
    with pytest.raises(FileDamaged):
        stores.load(store, root)
    with StoreWriter(store) as writer:
        assert fold(writer, "doc")
    assert troubles(store) == {"doc": "FileDamaged"}


def test_entries_before_the_bad_one_are_applied(store: Path, root: ExportRoot) -> None:
    stores.publish_delta(root, VIEW, rows(1, 1))
    break_(root, stores.publish_delta(root, VIEW, rows(2, 2)))
    stores.publish_delta(root, VIEW, rows(3, 3))
    with pytest.raises(FileDamaged):
        stores.load(store, root)
    assert seen(store)[:4] == [0, 1, 0, 0]


def test_a_list_of_services_that_is_damaged_keeps_no_view_from_loading(store: Path, root: ExportRoot) -> None:
    root.publish_services((FeatureService(name="ranking", features=("doc:a",)),))
    applied(store, root)
    (root.path / SERVICES).write_bytes(b"{}")
    stores.publish_delta(root, VIEW, rows(1, 1))
    with pytest.raises(ShoalError, match="changed after it was published"):
        stores.load(store, root)
    assert seen(store)[1] == 1
    assert set(FeatureStore.open(store).version().services) == {"ranking"}


# --- the lineage ----------------------------------------------------------------------------------------------


def drop(root: ExportRoot, manifest: Manifest) -> None:
    shutil.rmtree(root.path / "doc" / "deltas" / f"{manifest.seq:012d}")


def test_a_gap_is_waited_for(store: Path, root: ExportRoot, tmp_path: Path) -> None:
    applied(store, root)
    second = stores.publish_delta(root, VIEW, rows(1, 1))
    stores.publish_delta(root, VIEW, rows(2, 2))
    entry = root.path / "doc" / "deltas" / f"{second.seq:012d}"
    entry.rename(tmp_path / "late")
    with pytest.raises(DeltaGap):
        stores.load(store, root)
    assert (seen(store)[:3], troubles(store)) == ([0, 0, 0], {"doc": "DeltaGap"})
    (tmp_path / "late").rename(entry)
    assert applied(store, root) == [("doc", "delta", 2), ("doc", "delta", 3)]
    assert (seen(store)[:3], troubles(store)) == ([0, 1, 2], {})


def test_a_snapshot_leads_over_a_gap(store: Path, root: ExportRoot) -> None:
    applied(store, root)
    gone = stores.publish_delta(root, VIEW, rows(1, 1))
    stores.publish_snapshot(root, VIEW, rows(3, 3))
    stores.publish_delta(root, VIEW, rows(4, 4))
    drop(root, gone)
    (snapshot, _) = stores.load(store, root)
    assert (snapshot.seq, snapshot.reason) == (3, "entry 2 is gone from the log")
    assert seen(store)[:5] == [None, None, None, 3, 4]


def foreign(root: ExportRoot) -> None:
    stores.falsify(root, stores.publish_delta(root, VIEW, rows(1, 1)), parent="f" * 32)


def lost(root: ExportRoot) -> None:
    break_(root, stores.publish_delta(root, VIEW, rows(1, 1)))


def unreadable(root: ExportRoot) -> None:
    manifest = stores.publish_delta(root, VIEW, rows(1, 1))
    (root.path / "doc" / "deltas" / f"{manifest.seq:012d}" / "manifest.json").write_bytes(b"{}")


def bad_snapshot(root: ExportRoot) -> None:
    break_(root, stores.publish_snapshot(root, VIEW, rows(1, 1)))


@pytest.mark.parametrize("harm", [foreign, lost, unreadable, bad_snapshot])
def test_a_newer_snapshot_leads_around_an_entry_that_cannot_be_applied(
    store: Path, root: ExportRoot, harm: Callable[[ExportRoot], None]
) -> None:
    applied(store, root)
    good = root.entry("doc", 1)
    harm(root)
    with pytest.raises(ShoalError):
        stores.load(store, root)
    assert seen(store)[:2] == [0, 0]
    manifest = stores.published_table(VIEW, rows(5, 5), [], delta=False)
    publish(root, VIEW, manifest, seq=3, parent=good.id)
    (healed,) = stores.load(store, root)
    assert (healed.kind, healed.seq) == ("snapshot", 3)
    assert healed.reason is not None
    assert healed.reason.startswith("entry 2 cannot be applied: ")
    assert seen(store)[:6] == [None] * 5 + [5]
    assert troubles(store) == {}


def test_a_store_does_not_follow_another_root(store: Path, root: ExportRoot, tmp_path: Path) -> None:
    stores.publish_delta(root, VIEW, rows(1, 1))
    applied(store, root)
    other = ExportRoot(tmp_path / "other")
    stores.publish_snapshot(other, VIEW, rows(9, 9))
    with pytest.raises(ForeignDelta):
        stores.load(store, other)
    stores.publish_delta(other, VIEW, rows(8, 8))
    stores.publish_delta(other, VIEW, rows(8, 8))
    with pytest.raises(ForeignDelta):
        stores.load(store, other)
    assert seen(store)[:2] == [0, 1]
    applied(store, root)
    assert troubles(store) == {}


# --- rolling back ---------------------------------------------------------------------------------------------


def generations(store: Path) -> set[str]:
    return {path.name for path in generations_path(store, "doc").iterdir()}


def test_a_view_goes_back_stays_and_goes_on(store: Path, root: ExportRoot) -> None:
    applied(store, root)
    stores.publish_delta(root, VIEW, rows(1, 1))
    second = stores.publish_snapshot(root, VIEW, rows(2, *range(8)))
    stores.publish_delta(root, VIEW, rows(3, 3))
    applied(store, root)
    first = root.entry("doc", 1)
    inode = (generations_path(store, "doc") / second.snapshot_id / "data.mdb").stat().st_ino
    with StoreWriter(store) as writer:
        roll_back(writer, "doc", first.snapshot_id)
        assert seen(store)[:4] == [0, 0, 0, 0]
        assert catch_up(writer, root, "doc", stores.NullObserver()) == []
        stores.publish_delta(root, VIEW, rows(4, 4))
        assert catch_up(writer, root, "doc", stores.NullObserver()) == []
        assert seen(store)[:5] == [0, 0, 0, 0, 0]
        roll_back(writer, "doc", second.snapshot_id)
        assert seen(store)[:5] == [2, 2, 2, 2, 2]
        roll_back(writer, "doc", first.snapshot_id)
        follow_again(writer, "doc")
        again = catch_up(writer, root, "doc", stores.NullObserver())
    assert [(entry.kind, entry.seq) for entry in again] == [("delta", 2), ("snapshot", 3), ("delta", 4), ("delta", 5)]
    assert seen(store)[:5] == [2, 2, 2, 3, 4]
    assert generations(store) == {first.snapshot_id, second.snapshot_id}
    assert (generations_path(store, "doc") / second.snapshot_id / "data.mdb").stat().st_ino == inode


def test_what_is_not_kept_cannot_be_gone_back_to(store: Path, root: ExportRoot) -> None:
    applied(store, root)
    with StoreWriter(store) as writer:
        with pytest.raises(
            GenerationNotKept, match=f"'nonsense' on this node; it has {root.entry('doc', 1).snapshot_id}"
        ):
            roll_back(writer, "doc", "nonsense")
        with pytest.raises(GenerationNotKept, match="it has none"):
            roll_back(writer, "nowhere", "nonsense")


def test_only_so_many_generations_are_kept(store: Path, root: ExportRoot) -> None:
    manifests = [root.entry("doc", 1)]
    for value in range(1, 6):
        manifests.append(stores.publish_snapshot(root, VIEW, rows(value, 1)))
        applied(store, root)
    kept = [manifest.snapshot_id for manifest in reversed(manifests[-3:])]
    record = FeatureStore.open(store).version().view("doc").record
    assert [record.base.id, *(base.id for base in record.kept)] == kept
    assert generations(store) == set(kept)


def test_a_damaged_new_snapshot_leaves_the_way_back(store: Path, root: ExportRoot) -> None:
    applied(store, root)
    second = stores.publish_snapshot(root, VIEW, rows(1, 1))
    applied(store, root)
    break_(root, stores.publish_snapshot(root, VIEW, rows(2, 1)))
    with pytest.raises(FileDamaged):
        stores.load(store, root)
    with StoreWriter(store) as writer:
        roll_back(writer, "doc", root.entry("doc", 1).snapshot_id)
    assert seen(store)[:2] == [0, 0]
    assert troubles(store) == {}
    assert second.snapshot_id in generations(store)
