"""A store and its versions: which stores can be opened, what a version keeps alive, and what it releases."""

import gc
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pandas
import pyarrow as pa
import pytest

from shoal import FeatureStore
from shoal.engine.base.errors import (
    LookupInvalid,
    StoreClosed,
    StoreDamaged,
    StoreLocked,
    StoreNotFound,
    UnknownFeature,
)
from shoal.engine.format.catalog import SegmentRecord
from shoal.engine.format.paths import generation_path, live_path
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.store import open_version
from shoal.engine.store.environment import map_generation, open_live
from shoal.engine.store.open_version import read_generation
from shoal.engine.store.segment import Segment
from shoal.loaders.apply.entries import roll_back
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.follow.load import catch_up
from tests import stores

VIEW = stores.schema("doc", key="int64", a="int64", text="string")
OTHER = stores.schema("other", key="int64", a="int64")
KEYS = {"doc_id": list(range(40)), "other_id": 1}


def rows(value: int, count: int = 40) -> list[stores.Row]:
    return [{"doc_id": number, "a": value, "text": f"{value} " * 50} for number in range(count)]


def other(value: int) -> list[stores.Row]:
    return [{"other_id": number, "a": value} for number in range(40)]


@pytest.fixture
def root(tmp_path: Path) -> ExportRoot:
    return ExportRoot(tmp_path / "root")


@pytest.fixture
def store(tmp_path: Path, root: ExportRoot) -> Path:
    """A store of two views. The first view has a base and an overlay."""
    stores.publish_snapshot(root, VIEW, rows(1))
    stores.publish_delta(root, VIEW, rows(2, 20))
    stores.publish_snapshot(root, OTHER, other(1))
    stores.load(tmp_path / "store", root)
    return tmp_path / "store"


@pytest.fixture
def writer(store: Path) -> Iterator[StoreWriter]:
    with StoreWriter(store) as writer:
        yield writer


def follow(writer: StoreWriter, root: ExportRoot, view: str) -> None:
    catch_up(writer, root, view, stores.NullObserver())


# --- opening --------------------------------------------------------------------------------------------------


def test_a_directory_that_is_no_store_is_told(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(StoreNotFound, match="is not a Shoal store; `shoal load"):
            FeatureStore.open(path)
    (tmp_path / "live").write_text("a file")
    with pytest.raises(StoreNotFound):
        FeatureStore.open(tmp_path)
    (tmp_path / "live").unlink()
    live_path(tmp_path).mkdir(parents=True)
    (live_path(tmp_path) / "data.mdb").touch()  # As when a writer has just begun a store.
    with pytest.raises(StoreNotFound):
        FeatureStore.open(tmp_path)


def test_a_store_into_which_nothing_was_loaded_is_told(tmp_path: Path) -> None:
    live_path(tmp_path).mkdir(parents=True)
    lmdb.open(str(live_path(tmp_path)), max_dbs=2).close()
    with pytest.raises(StoreNotFound, match="nothing was loaded"):
        FeatureStore.open(tmp_path)


def test_a_store_that_could_not_be_opened_is_tried_again_though_the_error_is_kept(tmp_path: Path) -> None:
    """A worker may open the store after a writer has made the file and before it has filled it. The worker keeps the
    error as the reason why it cannot serve."""
    live_path(tmp_path).mkdir(parents=True)
    with lmdb.open(str(live_path(tmp_path)), max_dbs=3) as env, env.begin(write=True) as transaction:
        transaction.put(b"something", b"")
    kept = []
    for _ in range(2):
        with pytest.raises(StoreNotFound, match="nothing was loaded") as raised:
            FeatureStore.open(tmp_path)
        kept.append(raised.value)


def test_a_store_whose_writer_has_only_just_begun_has_no_views(tmp_path: Path) -> None:
    with StoreWriter(tmp_path):
        store = FeatureStore.open(tmp_path)
    assert store.version().views == {}
    with pytest.raises(UnknownFeature, match="no view 'doc'; it has none"):
        store.lookup(["doc:a"], KEYS)


@pytest.mark.parametrize("content", [b"x" * 8192, bytes(8192)])
def test_a_live_environment_that_is_none_is_damaged(tmp_path: Path, content: bytes) -> None:
    live_path(tmp_path).mkdir(parents=True)
    (live_path(tmp_path) / "data.mdb").write_bytes(content)
    with pytest.raises(StoreDamaged, match=r"is damaged: .*; restore a backup"):
        FeatureStore.open(tmp_path)


def test_a_generation_that_vanishes_in_part_is_missing(tmp_path: Path) -> None:
    with pytest.raises(StoreDamaged, match="is missing"):
        map_generation(generation_path(tmp_path, "doc", "1"))
    generation_path(tmp_path, "doc", "1").mkdir(parents=True)
    with pytest.raises(StoreDamaged, match="is missing"):
        map_generation(generation_path(tmp_path, "doc", "1"))
    (generation_path(tmp_path, "doc", "1") / "data.mdb").touch()
    with pytest.raises(StoreDamaged, match="is missing"):
        map_generation(generation_path(tmp_path, "doc", "1"))


def test_a_process_that_reads_a_store_cannot_begin_to_write_it(store: Path) -> None:
    gc.collect()
    reader = FeatureStore.open(store)
    with pytest.raises(StoreLocked, match="is open for reading in this process"):
        StoreWriter(store)
    del reader
    StoreWriter(store).close()


def test_opening_a_store_reads_a_small_part_of_it(tmp_path: Path, root: ExportRoot) -> None:
    wide = stores.schema("wide", key="int64", vector="float32[4096]")
    vectors = np.random.default_rng(1).random((1500, 4096), np.float32)
    stores.publish_snapshot(root, wide, [{"wide_id": n, "vector": v} for n, v in enumerate(vectors)], files=1)
    stores.load(tmp_path / "store", root)
    gc.collect()
    (generation,) = (tmp_path / "store" / "generations" / "wide").iterdir()
    _forget(generation / "data.mdb")
    before = _read_from_disk()
    store = FeatureStore.open(tmp_path / "store")
    opened = _read_from_disk()
    found = store.lookup(["wide:vector"], {"wide_id": [7]})
    np.testing.assert_array_equal(found["wide:vector"].values[0], vectors[7])
    if _read_from_disk() == opened:
        pytest.skip("this file system does not give up what it holds in memory")
    assert (generation / "data.mdb").stat().st_size > 20 << 20
    assert opened - before < 1 << 20
    assert _read_from_disk() - before < 2 << 20


def test_a_store_opened_and_let_go_leaves_nothing_behind(store: Path) -> None:
    def open_and_look() -> None:
        opened = FeatureStore.open(store)
        assert opened.lookup(["doc:a", "other:a"], KEYS).keys == 40
        again = FeatureStore.open(store)
        assert again.version().id == opened.version().id

    open_and_look()
    gc.collect()
    before = _descriptors(), _mapped(store)
    for _ in range(20):
        open_and_look()
    assert (_descriptors(), _mapped(store)) == before


def test_a_version_in_use_lets_its_store_be_opened_again(store: Path) -> None:
    gc.collect()
    version = FeatureStore.open(store).version()
    assert FeatureStore.open(store).version().id == version.id
    view = version.view("doc")
    del version
    assert FeatureStore.open(store).version().view("doc").record == view.record


# --- versions -------------------------------------------------------------------------------------------------


def test_a_lookup_sees_what_was_committed_last(writer: StoreWriter, root: ExportRoot, store: Path) -> None:
    reader = FeatureStore.open(store)
    versions = [reader.version().id]
    for value in range(3, 8):
        stores.publish_delta(root, VIEW, rows(value))
        follow(writer, root, "doc")
        result = reader.lookup(["doc:a"], KEYS)
        assert set(result.to_pydict()["doc:a"]) == {value}
        assert result.version == reader.version().id
        versions.append(result.version)
    assert versions == sorted(set(versions))


def test_a_version_is_read_once(store: Path) -> None:
    reader = FeatureStore.open(store)
    assert reader.version() is reader.version()
    reader.lookup(["doc:a"], KEYS)
    assert reader.version().view("doc").program(("a",)) is reader.version().view("doc").program(("a",))


def test_a_new_version_takes_over_what_did_not_change(writer: StoreWriter, root: ExportRoot, store: Path) -> None:
    reader = FeatureStore.open(store)
    before = reader.version()
    stores.publish_delta(root, OTHER, other(2))
    follow(writer, root, "other")
    after = reader.version()
    assert after.id > before.id
    assert after.view("doc").segments is before.view("doc").segments
    assert after.view("doc").transaction is not before.view("doc").transaction
    assert after.view("other").segments[1:] == before.view("other").segments
    assert after.view("other").segments[-1] is before.view("other").segments[-1]
    stores.publish_delta(root, OTHER, other(3)[:1])
    follow(writer, root, "other")
    assert reader.version().view("other").segments[1] is after.view("other").segments[0]


def test_a_base_that_goes_while_it_is_opened_makes_way_for_the_next(
    store: Path, root: ExportRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    with StoreWriter(store, kept_generations=0) as writer:
        reader = FeatureStore.open(store)
        reader.version()
        stores.publish_snapshot(root, VIEW, rows(3))
        follow(writer, root, "doc")
        gone: list[str] = []

        def overtaken(path: Path, record: SegmentRecord) -> Segment:
            if not gone:
                gone.append(record.id)
                stores.publish_snapshot(root, VIEW, rows(4))
                follow(writer, root, "doc")
                assert not generation_path(store, "doc", record.id).exists()
            return read_generation(path, record)

        monkeypatch.setattr(open_version, "read_generation", overtaken)
        assert set(reader.lookup(["doc:a"], KEYS).to_pydict()["doc:a"]) == {4}
        assert len(gone) == 1


def test_versions_let_go_leave_no_reader_behind(writer: StoreWriter, root: ExportRoot, store: Path) -> None:
    reader = FeatureStore.open(store)
    for value in range(12):
        stores.publish_delta(root, OTHER, other(value))
        follow(writer, root, "other")
        reader.lookup(["doc:a", "other:a"], KEYS)
    gc.collect()
    live = open_live(store)
    # The reader's and the writer's version, and one transaction kept for the next.
    assert len([line for line in live.env.readers().splitlines()[1:] if not line.endswith("-")]) <= 2


def test_a_views_version_stays_intact_while_it_is_held(writer: StoreWriter, root: ExportRoot, store: Path) -> None:
    reader = FeatureStore.open(store)
    held = reader.version().view("doc")
    before = [chunk.bytes.tobytes() for segment in held.segments for chunk in segment.chunks]
    # A commit of another view releases the version that this view came from. Then the view's overlay is dropped, and
    # new overlays would take its pages first.
    stores.publish_delta(root, OTHER, other(0))
    follow(writer, root, "other")
    reader.version()
    roll_back(writer, "doc", held.record.base.id)
    for value in range(20):
        stores.publish_delta(root, OTHER, other(value))
        follow(writer, root, "other")
        reader.version()
    assert [chunk.bytes.tobytes() for segment in held.segments for chunk in segment.chunks] == before
    for segment in held.segments:
        for chunk in segment.chunks:
            chunk.verify()


def test_an_answer_does_not_change_with_the_store(writer: StoreWriter, root: ExportRoot, store: Path) -> None:
    reader = FeatureStore.open(store)
    result = reader.lookup(["doc:*"], KEYS)
    for value in range(10, 16):
        stores.publish_delta(root, VIEW, rows(value))
        follow(writer, root, "doc")
        reader.lookup(["doc:a"], KEYS)
    assert result.to_pydict()["doc:a"] == [2] * 20 + [1] * 20
    assert result.to_pydict()["doc:text"] == ["2 " * 50] * 20 + ["1 " * 50] * 20


DIES_IN_A_COMMIT = """
import sys
from pathlib import Path
from shoal.engine.base.errors import DeltaGap
from shoal.loaders.commit.store_writer import StoreWriter
writer = StoreWriter(Path(sys.argv[1]))
print(writer.version().id, flush=True)
writer.note_trouble("doc", DeltaGap("half way"))
writer._live.env.begin(write=True)
print(writer.version().id, flush=True)
input()
"""
_LAST_TRANSACTION = 48
"""The offset in bytes of the last transaction's id in LMDB's lock file."""


def test_a_writer_that_dies_between_writing_and_announcing_a_commit_confuses_nobody(
    store: Path, root: ExportRoot
) -> None:
    gc.collect()
    reader = FeatureStore.open(store)
    command = [sys.executable, "-c", DIES_IN_A_COMMIT, str(store)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        before, after = (int(process.stdout.readline()) for _ in range(2))
        assert after == before + 1
        with (live_path(store) / "lock.mdb").open("r+b") as lock:
            lock.seek(_LAST_TRANSACTION)
            if struct.unpack("<Q", lock.read(8)) != (after,):
                pytest.skip("this LMDB keeps the last transaction elsewhere")
            lock.seek(_LAST_TRANSACTION)
            lock.write(struct.pack("<Q", before))
        process.send_signal(signal.SIGKILL)
    version = reader.version()
    assert version.id == before
    assert reader.version() is version
    stores.publish_delta(root, VIEW, rows(3))
    load = "import sys; from pathlib import Path; from tests import stores;"
    load += (
        "from shoal.engine.root.export_root import ExportRoot; stores.load(Path(sys.argv[1]), ExportRoot(sys.argv[2]))"
    )
    subprocess.run([sys.executable, "-c", load, str(store), str(root)], check=True)
    assert reader.version().id > after
    assert set(reader.lookup(["doc:a"], KEYS).to_pydict()["doc:a"]) == {3}


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _mapped(store: Path) -> int:
    """Return the bytes of address space that the generations of a store take in this process."""
    size = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if f"{store}/generations/" in line:
            start, end = line.split(" ")[0].split("-")
            size += int(end, 16) - int(start, 16)
    return size


def _forget(path: Path) -> None:
    """Drop a file from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read_from_disk() -> int:
    """Return the bytes that this process has read from a disk so far."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


# --- what a notebook does ------------------------------------------------------------------------------------------

NOT_REQUESTS: list[tuple[Any, Any, dict[str, Any], str]] = [
    (["doc:a"], [1, 2], {}, r"the entities are \[1, 2\]; give a DataFrame, or the values by join key"),
    (["doc:a"], [{"doc_id": 1}], {}, r"the entities are \[\{'doc_id': 1\}\]; give a DataFrame"),
    (["doc:a"], "doc_id", {}, "the entities are 'doc_id'; give"),
    (["doc:a"], None, {}, "the entities are None; give"),
    (["doc:a"], {"doc_id": {1, 2}}, {}, "entity 'doc_id' is of type set; give a scalar, a list"),
    (["doc:a"], {"doc_id": object()}, {}, "entity 'doc_id' is of type object"),
    (["doc:a"], {"doc_id": [[1]]}, {}, "entity 'doc_id' must be int64, but holds list"),
    (["doc:a"], pandas.DataFrame({"doc_id": [1.5]}), {}, "entity 'doc_id' must be int64, but holds double"),
    (["doc:a"], pandas.DataFrame([[1, 2]], columns=["doc_id", "doc_id"]), {}, "two columns 'doc_id'"),
    (None, {"doc_id": 1}, {}, "the features are None; give a list"),
    ({"doc:a"}, {"doc_id": 1}, {}, r"the features are \{'doc:a'\}; give a list"),
    ([1], {"doc_id": 1}, {}, r"the features are \[1\]; give a list"),
    (
        ["doc:a"],
        {"doc_id": 1},
        {"max_age": 3600},
        r"max_age is 3600; give a timedelta, such as timedelta\(seconds=3600",
    ),
    (["doc:a"], {"doc_id": 1}, {"max_age": "1h"}, "max_age is '1h'; give a timedelta"),
    (["doc:a"], {"doc_id": 1}, {"max_age": timedelta(-1)}, "max_age is -1 day, 0:00:00; give a timedelta that is not"),
    (["doc:a"], {"doc_id": 1}, {"stale": None}, "stale is None; it must be one of"),
]


def test_what_is_no_request_gets_an_error_that_helps(store: Path) -> None:
    with FeatureStore.open(store) as opened:
        for features, entities, options, message in NOT_REQUESTS:
            for look_up in (opened.lookup, opened.lookup_matrix):
                with pytest.raises(LookupInvalid, match=message):
                    look_up(features, entities, **options)


def test_entities_may_be_tables(store: Path) -> None:
    tables: list[Any] = [
        pandas.DataFrame({"doc_id": [30, 0], "note": ["x", "y"]}),
        pa.table({"doc_id": [30, 0]}),
        pa.record_batch({"doc_id": [30, 0]}),
    ]
    with FeatureStore.open(store) as opened:
        for table in tables:
            assert opened.lookup(["doc:a"], table).to_pydict() == {"doc:a": [1, 2]}
            assert opened.lookup_matrix(["doc:a"], table).matrix.tolist() == [[1], [2]]


def test_a_store_that_is_closed_says_so_and_its_answers_stay(store: Path) -> None:
    with FeatureStore.open(store) as opened:
        views = opened.views()
        answer = opened.lookup(["doc:a"], {"doc_id": [0]})
        assert repr(opened) == f"FeatureStore.open('{store}')"
    assert {name: [feature.name for feature in view.features] for name, view in views.items()} == {
        "doc": ["a", "text"],
        "other": ["a"],
    }
    for use in (opened.views, opened.version, lambda: opened.lookup(["doc:a"], {"doc_id": [0]})):
        with pytest.raises(StoreClosed, match=f"the store at {store} was closed"):
            use()
    opened.close()
    assert answer.to_pydict() == {"doc:a": [2]}
    # No part of the store is open any more, so this process may write to it.
    del answer
    gc.collect()
    StoreWriter(store).close()


def test_a_data_frame_has_the_very_values(tmp_path: Path, root: ExportRoot) -> None:
    view = stores.schema("all", key="int64", i="int64", n="int32", ok="bool", f="float32", s="string", t="timestamp")
    largest = {"i": 2**63 - 1, "n": -(2**31), "ok": True, "f": 0.1, "s": "", "t": stores.NOW}
    stores.publish_snapshot(root, view, [{"all_id": 1, **largest}, {"all_id": 2}])
    stores.load(tmp_path / "store", root)
    with FeatureStore.open(tmp_path / "store") as opened:
        frame = opened.lookup(["all:*"], {"all_id": [1, 2, 3]}).to_pandas()
        whole = opened.lookup(["all:i", "all:ok"], {"all_id": [1]}).to_pandas()
    types = {"i": "Int64", "n": "Int32", "ok": "boolean", "f": "float32", "s": "object", "t": "datetime64[us, UTC]"}
    assert {name.removeprefix("all:"): str(of) for name, of in frame.dtypes.items()} == types
    assert frame.iloc[0].to_dict() == {
        f"all:{name}": (np.float32(0.1) if name == "f" else value) for name, value in largest.items()
    }
    assert bool(frame.iloc[1:].isna().all(axis=None))
    # A column without nulls has the same type, so code that reads it does not depend on the keys.
    assert [str(of) for of in whole.dtypes] == ["Int64", "boolean"]


def test_what_is_shown_of_answers_is_short(store: Path) -> None:
    with FeatureStore.open(store) as opened:
        answer = opened.lookup(["doc:*", "other:a"], KEYS)
        many = opened.lookup(["doc:a"] * 50, KEYS)
        version = opened.version()
        matrix = opened.lookup_matrix(["doc:a"], KEYS)
    assert repr(answer) == f"<LookupResult of version {version.id}: 40 keys × doc:a, doc:text, other:a>"
    assert repr(many).endswith("doc:a, doc:a, … (50 in all)>")
    assert repr(matrix) == f"<MatrixResult of version {version.id}: 40 keys × 1 columns of float64>"
    shown = [answer.columns, answer.views, answer.parts, version, version.views]
    assert all(len(repr(thing)) < 200 for thing in shown), shown
