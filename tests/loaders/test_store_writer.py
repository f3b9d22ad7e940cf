"""One writer per store, and commits that every reader sees either completely or not at all."""

import gc
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest

from shoal import FeatureStore
from shoal.engine.base.errors import DeltaGap, StoreDamaged, StoreLocked
from shoal.engine.format.catalog import ViewRecord
from shoal.engine.format.paths import generations_path, live_path
from shoal.engine.format.schema import FeatureService
from shoal.engine.root.export_root import ExportRoot
from shoal.loaders.backup.accepted_loss import accept_loss
from shoal.loaders.commit.store_writer import LOCK, StoreWriter
from shoal.loaders.follow.load import catch_up
from shoal.loaders.segments.generation import GenerationBuilder, fold_id
from tests import stores

VIEW = stores.schema("doc", key="int64", a="int64")
OTHER = stores.schema("other", key="int64", a="int64")


def rows(value: int, view: str = "doc") -> list[stores.Row]:
    return [{f"{view}_id": number, "a": value} for number in range(30)]


@pytest.fixture
def root(tmp_path: Path) -> ExportRoot:
    root = ExportRoot(tmp_path / "root")
    stores.publish_snapshot(root, VIEW, rows(0))
    stores.publish_snapshot(root, OTHER, rows(0, "other"))
    return root


@pytest.fixture
def writer(store: Path) -> Iterator[StoreWriter]:
    with StoreWriter(store) as writer:
        yield writer


# --- the right to write ---------------------------------------------------------------------------------------

HOLDS = "import sys; from pathlib import Path; from shoal.loaders.commit.store_writer import StoreWriter\n"
HOLDS += "writer = StoreWriter(Path(sys.argv[1])); print('holds', flush=True); input()"


def test_a_store_has_one_writer_among_processes(store: Path) -> None:
    command = [sys.executable, "-c", HOLDS, str(store)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "holds\n"
        with pytest.raises(StoreLocked, match=f"is being written by process {process.pid}; stop it first. If it"):
            StoreWriter(store)
        with pytest.raises(StoreLocked, match=f"by process {process.pid}; stop it first: otherwise data that"):
            accept_loss(store)
        reader = FeatureStore.open(store)
        assert reader.lookup(["doc:a"], {"doc_id": 1}).to_pydict() == {"doc:a": [0]}
        process.kill()
    del reader
    gc.collect()
    StoreWriter(store).close()


def test_a_store_has_one_writer_in_a_process(store: Path) -> None:
    with StoreWriter(store) as writer, pytest.raises(StoreLocked, match=f"process {os.getpid()}"):
        StoreWriter(writer.store)
    StoreWriter(store).close()
    assert (store / "run" / LOCK).read_text() == str(os.getpid())


def test_a_writer_that_cannot_start_leaves_no_lock(store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "copy")
    data = live_path(tmp_path / "copy") / "data.mdb"
    content = data.read_bytes()
    data.write_bytes(content[:8192])
    with pytest.raises(StoreDamaged) as caught:
        StoreWriter(tmp_path / "copy")
    data.write_bytes(content)
    StoreWriter(tmp_path / "copy").close()
    assert caught.value is not None


# --- commits --------------------------------------------------------------------------------------------------


def test_a_commit_of_nothing_writes_nothing(writer: StoreWriter) -> None:
    before = writer.version().id
    assert writer.commit_view("doc", lambda record: None) is None
    assert writer.commit_view("nowhere", lambda record: record) is None
    assert writer.version().id == before


def test_a_commit_that_fails_leaves_the_last_version(writer: StoreWriter) -> None:
    reader = FeatureStore.open(writer.store)
    before = reader.version()

    def fail(record: ViewRecord | None) -> ViewRecord:
        raise RuntimeError("it failed")

    with pytest.raises(RuntimeError, match="it failed"):
        writer.commit_view("doc", fail)
    assert reader.version() is before
    follow(writer, ExportRoot(writer.store.parent / "root"), 1)
    assert reader.version().id > before.id


def follow(writer: StoreWriter, root: ExportRoot, value: int) -> None:
    stores.publish_delta(root, VIEW, rows(value))
    catch_up(writer, root, "doc", stores.NullObserver())


def test_views_are_committed_side_by_side_from_many_threads(writer: StoreWriter, root: ExportRoot) -> None:
    failures: list[BaseException] = []

    def drive(view: str) -> None:
        try:
            for value in range(1, 15):
                stores.publish_delta(root, {"doc": VIEW, "other": OTHER}[view], rows(value, view))
                catch_up(writer, root, view, stores.NullObserver())
                assert writer.record(view)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=drive, args=(view,)) for view in ("doc", "other")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    found = FeatureStore.open(writer.store).lookup(["doc:a", "other:a"], {"doc_id": 1, "other_id": 2})
    assert found.to_pydict() == {"doc:a": [14], "other:a": [14]}


def test_where_a_store_came_from_is_noted_once(writer: StoreWriter) -> None:
    services = (FeatureService(name="ranking", features=("doc:a",)),)
    writer.commit_root("/somewhere", services)
    before = writer.version().id
    writer.commit_root("/somewhere", services)
    assert writer.version().id == before
    writer.commit_root("/elsewhere", ())
    assert writer.version().id == before + 1
    assert (writer.version().store.root, writer.version().services) == ("/elsewhere", {})


def test_troubles_are_noted_and_cleared_once(writer: StoreWriter) -> None:
    writer.note_trouble("new", DeltaGap("one"))
    noted = writer.version()
    writer.note_trouble("new", DeltaGap("one"))
    assert writer.version().id == noted.id
    assert noted.troubles["new"].code == "DeltaGap"
    writer.clear_trouble("doc")
    assert writer.version().id == noted.id
    writer.clear_trouble("new")
    assert writer.version().troubles == {}


# --- leftovers of a dead writer -------------------------------------------------------------------------------


def names(store: Path) -> set[str]:
    return {path.name for path in generations_path(store, "doc").iterdir()}


def test_what_a_dead_writer_left_behind_is_cleared_away(store: Path) -> None:
    before = names(store)
    for generation_id in (fold_id(7), "000000000009-abcdef01"):
        GenerationBuilder(store, "doc", generation_id)
    shutil.copytree(
        generations_path(store, "doc") / before.copy().pop(), generations_path(store, "doc") / "never-named"
    )
    StoreWriter(store).close()
    # A snapshot's build continues where it stopped. A fold's build cannot continue, and an unreferenced generation is
    # useless.
    assert names(store) == before | {".building-000000000009-abcdef01"}


def test_overlays_that_no_record_names_are_not_served(store: Path, root: ExportRoot) -> None:
    env = lmdb.open(str(live_path(store)), max_dbs=2)
    with env.begin(write=True) as transaction:
        transaction.put(b"doc.9-9.00000000/000000", b"x" * 5000, db=env.open_db(b"segments", transaction))
    env.close()
    reader = FeatureStore.open(store)
    assert len(reader.version().view("doc").segments) == 1


def test_a_store_whose_writer_died_before_its_second_database_can_be_written(tmp_path: Path, root: ExportRoot) -> None:
    live_path(tmp_path / "new").mkdir(parents=True)
    env = lmdb.open(str(live_path(tmp_path / "new")), max_dbs=2)
    env.open_db(b"catalog", create=True)
    env.close()
    stores.load(tmp_path / "new", root)
    assert set(FeatureStore.open(tmp_path / "new").version().views) == {"doc", "other"}


def test_a_live_environment_of_no_bytes_is_begun_anew(tmp_path: Path, root: ExportRoot) -> None:
    live_path(tmp_path / "new").mkdir(parents=True)
    (live_path(tmp_path / "new") / "data.mdb").touch()
    stores.load(tmp_path / "new", root)
    assert set(FeatureStore.open(tmp_path / "new").version().views) == {"doc", "other"}
