"""A view with damaged data in the store is loaded again by the next writer, and nothing else is lost."""

import gc
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lmdb
import pytest

from shoal import FeatureStore
from shoal.engine.base.errors import DeltaGap, GenerationNotKept, StoreDamaged, ViewDamaged
from shoal.engine.format.paths import generation_path, generations_path, live_path
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.root.manifest import Manifest
from shoal.loaders.apply.compaction import fold
from shoal.loaders.apply.entries import roll_back
from shoal.loaders.backup.verify import verify_store
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.follow.load import AppliedEntry, catch_up
from shoal.loaders.follow.reload import ReloadOrder, reload_view
from shoal.loaders.follow.repair import repair
from tests import stores
from tests.damage import BASE, OVERLAYS, base_path, every_harm, harm

VIEW = stores.schema("doc", key="int64", a="int64")
OTHER = stores.schema("other", key="int64", a="int64")
WHOLE = [3, 2, 1, 1]


def rows(value: int, *keys: int) -> list[stores.Row]:
    return [{"doc_id": key, "a": value} for key in keys]


@pytest.fixture
def root(tmp_path: Path) -> ExportRoot:
    root = ExportRoot(tmp_path / "root")
    stores.publish_snapshot(root, VIEW, rows(1, *range(40)))
    stores.publish_delta(root, VIEW, rows(2, *range(20)))
    stores.publish_delta(root, VIEW, rows(3, 0))
    stores.publish_snapshot(root, OTHER, [{"other_id": 1, "a": 1}])
    return root


@pytest.fixture
def store(tmp_path: Path, root: ExportRoot) -> Iterator[Path]:
    stores.load(tmp_path / "store", root)
    gc.collect()
    yield tmp_path / "store"
    gc.collect()


def seen(store: Path, view: str = "doc") -> list[int]:
    keys = {"doc_id": [0, 1, 20, 39], "other_id": 1}
    found: list[int] = FeatureStore.open(store).lookup([f"{view}:a"], keys).to_pydict()[f"{view}:a"]
    return found


def troubles(store: Path) -> dict[str, str]:
    return {view: trouble.message for view, trouble in FeatureStore.open(store).version().troubles.items()}


def entries(applied: list[AppliedEntry]) -> list[tuple[str, int]]:
    return [(entry.kind, entry.seq) for entry in applied if entry.view == "doc"]


def check_whole(store: Path) -> None:
    assert seen(store) == WHOLE
    assert troubles(store) == {}
    assert [checked for checked in verify_store(store) if checked.problem] == []


@every_harm
def test_a_damaged_view_is_loaded_again(store: Path, root: ExportRoot, how: str) -> None:
    harm(store, "doc", how)
    applied = stores.load(store, root)
    check_whole(store)
    if how in BASE:
        # The entries over the base need not be applied again, and may have come from elsewhere.
        assert entries(applied) == [("snapshot", 1)]
    elif how in OVERLAYS:
        assert entries(applied) == [("delta", 2), ("delta", 3)]
    else:
        assert entries(applied) == [("snapshot", 1), ("delta", 2), ("delta", 3)]
    assert stores.load(store, root) == []
    env = lmdb.open(str(live_path(store)), max_dbs=2, readonly=True)
    with env.begin() as transaction:
        stored = {
            bytes(key).decode().partition("/")[0]
            for key, _ in transaction.cursor(db=env.open_db(b"segments", transaction))
        }
    env.close()
    named = FeatureStore.open(store).version().view("doc").record.overlays
    assert stored == {overlay.id for overlay in named}


@every_harm
def test_a_damaged_view_stays_named_and_holds_up_no_other_where_there_is_no_root(
    store: Path, root: ExportRoot, how: str
) -> None:
    harm(store, "doc", how)
    with StoreWriter(store) as writer:
        assert writer.version().troubles["doc"].code == "StoreDamaged"
        noted = writer.version().id
        stores.publish_delta(root, OTHER, [{"other_id": 1, "a": 7}])
        catch_up(writer, root, "other", stores.NullObserver())
        with pytest.raises(ViewDamaged):
            fold(writer, "doc")
    assert seen(store, "other") == [7] * 4
    with StoreWriter(store) as writer:
        assert writer.version().id == noted + 1, "a trouble that is known is not noted again"


def test_what_is_damaged_while_a_writer_runs_is_loaded_again_too(store: Path, root: ExportRoot) -> None:
    with StoreWriter(store) as writer:
        reader = FeatureStore.open(store)
        before = reader.version().view("doc")
        path = base_path(store, "doc")
        content = path.read_bytes()
        path.unlink()
        applied = catch_up(writer, root, "doc", stores.NullObserver())
        assert entries(applied) == [("snapshot", 1)]
        assert "is missing, though the catalog names it" in (applied[0].reason or "")
        assert path.read_bytes()[8192:] == content[8192:]
        # Readers of the old file keep it, while new lookups use the new file.
        assert before.segments[-1].chunks[0].bytes.tobytes() == content[before.record.base.offsets[0] :]
        assert reader.version().view("doc").segments[-1] is not before.segments[-1]
    check_whole(store)


def test_a_view_that_is_whole_again_meanwhile_is_left_as_it_is(store: Path, root: ExportRoot) -> None:
    with StoreWriter(store) as writer:
        before = writer.record("doc")
        assert repair(writer, root, "doc", StoreDamaged("it was, a moment ago"), stores.NullObserver().started) is None
        assert writer.record("doc") == before


def test_nothing_is_taken_for_damaged_while_folds_replace_bases(store: Path, root: ExportRoot) -> None:
    found: list[StoreDamaged | None] = []
    with StoreWriter(store) as writer, ThreadPoolExecutor(1) as pool:
        folding = pool.submit(lambda: [fold(writer, "doc") for _ in range(30)])
        while not folding.done():
            found.append(writer.damage("doc"))
        folding.result()
    assert found
    assert set(found) == {None}


def test_a_base_that_was_folded_here_is_made_anew_of_the_log(store: Path, root: ExportRoot) -> None:
    with StoreWriter(store) as writer:
        assert fold(writer, "doc")
    gc.collect()
    stores.publish_delta(root, VIEW, rows(9, 39))
    stores.load(store, root)
    gc.collect()
    path = base_path(store, "doc")
    path.unlink()
    applied = stores.load(store, root)
    assert entries(applied) == [("snapshot", 1), ("delta", 2), ("delta", 3), ("delta", 4)]
    assert seen(store) == [3, 2, 1, 9]
    assert not path.parent.exists()


def test_a_view_whose_deltas_are_gone_is_served_as_of_its_base_until_they_come_back(
    store: Path, root: ExportRoot
) -> None:
    delta = root.path / "doc" / "deltas" / f"{2:012d}"
    delta.rename(root.path / "away")
    harm(store, "doc", "overlay missing")
    with pytest.raises(DeltaGap):
        stores.load(store, root)
    assert seen(store) == [1] * 4
    assert "entry 2 is missing" in troubles(store)["doc"]
    gc.collect()
    (root.path / "away").rename(delta)
    stores.load(store, root)
    check_whole(store)


def test_a_widened_view_starts_over_from_before_it_was_widened(store: Path, root: ExportRoot) -> None:
    wider = stores.schema("doc", key="int64", a="int64", b="int64")
    stores.publish_delta(root, wider, [{"doc_id": 0, "a": 4, "b": 4}])
    stores.load(store, root)
    with StoreWriter(store) as writer:
        assert fold(writer, "doc")
    gc.collect()
    base_path(store, "doc").unlink()
    assert entries(stores.load(store, root))[0] == ("snapshot", 1)
    assert seen(store) == [4, 2, 1, 1]


# --- where a repair is impossible -----------------------------------------------------------------------------


def break_(root: ExportRoot, manifest: Manifest) -> None:
    path = root.directory(manifest) / manifest.files[0].path
    path.write_bytes(path.read_bytes()[:-1])


def check_stays_damaged(store: Path, root: ExportRoot, message: str) -> None:
    for _ in range(2):
        with pytest.raises(StoreDamaged, match=message):
            stores.load(store, root)
        gc.collect()
    before = FeatureStore.open(store).version()
    assert message in before.troubles["doc"].message
    assert "is missing, though the catalog names it" in before.troubles["doc"].message
    assert seen(store, "other") == [1] * 4
    del before
    gc.collect()


def test_a_root_that_is_damaged_too_is_named_and_a_newer_snapshot_mends_it(store: Path, root: ExportRoot) -> None:
    break_(root, root.entry("doc", 1))
    harm(store, "doc", "base missing")
    check_stays_damaged(store, root, "is not readable as Parquet")
    stores.publish_snapshot(root, VIEW, rows(5, *range(40)))
    stores.load(store, root)
    assert (seen(store), troubles(store)) == ([5] * 4, {})


def test_another_root_is_no_replacement(store: Path, tmp_path: Path) -> None:
    other = ExportRoot(tmp_path / "elsewhere")
    stores.publish_snapshot(other, VIEW, rows(9, *range(40)))
    harm(store, "doc", "base missing")
    check_stays_damaged(store, other, "this is a different root, or it was created again")


def test_a_root_that_is_gone_is_named(store: Path, root: ExportRoot) -> None:
    harm(store, "doc", "base missing")
    root.path.rename(root.path.with_name("away"))
    with StoreWriter(store) as writer, pytest.raises(StoreDamaged, match=r"is missing.*export root .* does not exist"):
        catch_up(writer, root, "doc", stores.NullObserver())


# --- rollbacks ------------------------------------------------------------------------------------------------


@pytest.fixture
def pinned(store: Path, root: ExportRoot) -> Path:
    """A store with a view that was rolled back to its first generation."""
    first = root.entry("doc", 1).snapshot_id
    stores.publish_snapshot(root, VIEW, rows(5, *range(40)))
    stores.load(store, root)
    with StoreWriter(store) as writer:
        roll_back(writer, "doc", first)
    gc.collect()
    return store


def test_a_view_that_was_told_to_stay_stays(pinned: Path, root: ExportRoot) -> None:
    base_path(pinned, "doc").unlink()
    assert entries(stores.load(pinned, root)) == [("snapshot", 1)]
    assert (seen(pinned), troubles(pinned)) == ([1] * 4, {})
    assert FeatureStore.open(pinned).version().view("doc").record.pinned


def test_a_view_that_cannot_stay_waits_for_the_order_to_go_on(pinned: Path, root: ExportRoot) -> None:
    first = root.entry("doc", 1)
    shutil.rmtree(root.directory(first))
    base_path(pinned, "doc").unlink()
    with pytest.raises(StoreDamaged, match="is not published"):
        stores.load(pinned, root)
    with StoreWriter(pinned) as writer:
        reload_view(writer, root, "doc", ReloadOrder(view="doc"), stores.NullObserver())
    gc.collect()
    assert (seen(pinned), troubles(pinned)) == ([5] * 4, {})


def test_nobody_goes_back_to_a_generation_that_is_damaged(pinned: Path, root: ExportRoot) -> None:
    newest = root.entry("doc", 4).snapshot_id
    generation_path(pinned, "doc", newest).joinpath("data.mdb").write_bytes(b"x" * 100_000)
    with StoreWriter(pinned) as writer:
        with pytest.raises(GenerationNotKept, match=f"generation '{newest}' is damaged; go back to another"):
            roll_back(writer, "doc", newest)
        # When the view follows the log again, the generation is rebuilt.
        reload_view(writer, root, "doc", ReloadOrder(view="doc"), stores.NullObserver())
    gc.collect()
    assert seen(pinned) == [5] * 4
    assert [checked for checked in verify_store(pinned) if checked.problem] == []
    assert newest in {path.name for path in generations_path(pinned, "doc").iterdir()}
