"""Processes with an old version of a store: they move to a new version if they can, and status names them if they
cannot."""

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shoal import FeatureStore
from shoal.engine.base.errors import StoreDamaged
from shoal.engine.format.paths import DATA, live_path, live_paths
from shoal.engine.format.progress import begun_path
from shoal.engine.format.schema import FeatureService
from shoal.engine.lookup.columns import lookup
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.status.live import describe_live
from shoal.engine.store import background_refresh
from shoal.loaders.commit import live_replacement
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.push.push import push_rows
from tests import stores
from tests.server.serving import eventually

HELD_BYTES = 1 << 18
DOC = stores.schema("doc", key="int64", a="int64")
READER = """
import sys
from shoal import FeatureStore
store = FeatureStore.open(sys.argv[1])
store.lookup(["doc:a"], {"doc_id": [1]})
print("open", flush=True)
for line in sys.stdin:
    print(store.lookup(["doc:a"], {"doc_id": [int(line)]}).to_pydict()["doc:a"][0], flush=True)
"""


@pytest.fixture
def root(tmp_path: Path) -> ExportRoot:
    root = ExportRoot(tmp_path / "root")
    stores.publish_snapshot(root, DOC, [{"doc_id": number, "a": number} for number in range(100)])
    return root


@contextmanager
def reader(store: Path) -> Iterator["subprocess.Popen[bytes]"]:
    command = [sys.executable, "-c", READER, str(store)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"open\n"
            yield process
        finally:
            process.kill()


def asked(process: "subprocess.Popen[bytes]", key: int) -> int:
    """Return a reader's answer for a key."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"%d\n" % key)
    process.stdin.flush()
    return int(process.stdout.readline())


def push(store: Path, times: int) -> None:
    with StoreWriter(store) as writer:
        push_often(writer, times)


def push_often(writer: StoreWriter, times: int = 40) -> None:
    for number in range(times):
        push_rows(writer, "doc", {"doc_id": [number % 100], "a": [number]})


def size(store: Path) -> int:
    return sum((path / DATA).stat().st_size for path in live_paths(store))


@pytest.fixture
def replaced_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_replacement, "LEAST_HELD_BYTES", HELD_BYTES)
    monkeypatch.setattr(live_replacement, "HELD_SECONDS", 0.0)


def status(store: Path) -> str:
    """Return the output of `shoal status` from another process, because a process that writes does not count as a
    reader."""
    command = [sys.executable, "-m", "shoal", "status", "--store", str(store)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_reader_that_is_stopped_is_named_and_holds_back_pages_until_it_goes_on(store: Path) -> None:
    with reader(store) as process:
        os.kill(process.pid, signal.SIGSTOP)
        push(store, 200)
        held = size(store)
        assert (oldest := describe_live(store)["oldest_reader"]) is not None
        assert (oldest["pid"], oldest["versions_behind"] >= 200) == (process.pid, True)
        assert f"process {process.pid} holds a version that is" in status(store)
        os.kill(process.pid, signal.SIGCONT)
        eventually(lambda: describe_live(store)["oldest_reader"] is None, "the reader's moving on")
        os.kill(process.pid, signal.SIGSTOP)
        push(store, 1)
        process.kill()
        process.wait()
        # The pages that the process held are used again.
        push(store, 200)
        assert size(store) < held + (1 << 20)
        assert describe_live(store)["oldest_reader"] is None
        assert "holds a version" not in status(store)


@pytest.mark.usefixtures("replaced_soon")
def test_a_reader_that_is_stopped_makes_a_store_grow_up_to_a_bound(store: Path) -> None:
    with reader(store) as process:
        os.kill(process.pid, signal.SIGSTOP)
        before = size(store)
        sizes = []
        path = live_path(store)
        for _ in range(10):
            push(store, 20)
            sizes.append(size(store))
        assert path != live_path(store)
        # The old file contains the held pages and the room for its last commit, and nothing more. The new file is
        # small.
        assert max(sizes) < before + HELD_BYTES + (2 << 20)
        assert sizes[-1] < sizes[3] + (1 << 19)
        assert (oldest := describe_live(store)["oldest_reader"]) is not None
        assert (oldest["pid"], oldest["versions_behind"] >= 200) == (process.pid, True)
        assert describe_live(store)["bytes"] == sizes[-1]
        assert f"process {process.pid} holds a version that is" in status(store)
        os.kill(process.pid, signal.SIGCONT)
        assert asked(process, 19) == 19
        eventually(lambda: describe_live(store)["oldest_reader"] is None, "the reader's moving on")
        push(store, 1)
        assert live_paths(store) == [live_path(store)]
        assert size(store) < before + HELD_BYTES
        assert asked(process, 0) == 0


@pytest.mark.usefixtures("replaced_soon")
def test_what_is_in_a_replaced_environment_is_all_there(store: Path, root: ExportRoot) -> None:
    root.publish_services((FeatureService(name="ranking", features=("doc:a",)),))
    stores.load(store, root)
    with StoreWriter(store) as writer:
        reader = FeatureStore.open(store)
        held = reader.version()
        ids = [held.id]
        path = live_path(store)
        number = 0
        first = push_rows(writer, "doc", {"doc_id": [1], "a": [1001]}, request_id="once")
        while live_path(store) == path:
            number += 1
            push_rows(writer, "doc", {"doc_id": [2], "a": [number]})
            ids.append(reader.version().id)
            assert reader.lookup("ranking", {"doc_id": [1, 2, 3]}).to_pydict() == {"doc:a": [1001, number, 3]}
        assert ids == sorted(set(ids))
        push_rows(writer, "doc", {"doc_id": [1], "a": [1002]})
        assert push_rows(writer, "doc", {"doc_id": [1], "a": [1001]}, request_id="once").applied == first.applied
    for store_again in (reader, FeatureStore.open(store)):
        assert store_again.lookup("ranking", {"doc_id": [1, 2]}).to_pydict() == {"doc:a": [1002, number]}
    now = time.time_ns() // 1000
    assert lookup(held, "ranking", {"doc_id": [1, 2, 3]}, now=now).to_pydict() == {"doc:a": [1, 2, 3]}


@pytest.mark.usefixtures("replaced_soon")
def test_a_replaced_environment_is_removed_once_nobody_reads_it(store: Path) -> None:
    with StoreWriter(store) as writer:
        held = FeatureStore.open(store).version()
        push_often(writer)
        assert len(live_paths(store)) == 2
        assert held.view("doc").record.applied_seq == 1
        del held
        gc.collect()
        push_rows(writer, "doc", {"doc_id": [1], "a": [1]})
        assert len(live_paths(store)) == 1


@pytest.mark.usefixtures("replaced_soon")
def test_where_the_newest_environment_is_taken_away_nobody_takes_the_one_before_for_all_there_was(store: Path) -> None:
    with StoreWriter(store) as writer:
        held = FeatureStore.open(store).version()
        push_often(writer)
        newest, before = live_paths(store)
    newest.rename(store / "taken-away")
    del writer
    gc.collect()
    assert held.live.path == before.resolve()
    for _ in range(2):
        with pytest.raises(StoreDamaged, match="was replaced by a newer directory"):
            StoreWriter(store)
        # The record may also be missing, because the environment itself says that a newer one replaced it.
        begun_path(store).unlink(missing_ok=True)
    (store / "taken-away").rename(newest)
    with StoreWriter(store) as writer:
        push_rows(writer, "doc", {"doc_id": [0], "a": [77]})
    assert FeatureStore.open(store).lookup(["doc:a"], {"doc_id": [0]}).to_pydict() == {"doc:a": [77]}


@pytest.mark.usefixtures("replaced_soon")
def test_where_there_is_no_room_for_a_copy_commits_go_on(
    store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(live_replacement, "DATA", "/dev/full")
    with StoreWriter(store) as writer:
        held = FeatureStore.open(store).version()
        push_often(writer)
        assert [record.message for record in caplog.records if "cannot replace the live environment" in record.message]
        assert live_paths(store) == [held.live.path]
        assert not list((store / "live").glob(".*"))


def test_an_idle_store_moves_on_by_itself(store: Path) -> None:
    with reader(store) as process:
        push(store, 5)
        assert process.poll() is None
        eventually(lambda: describe_live(store)["oldest_reader"] is None, "the reader's moving on")


def test_a_store_that_is_let_go_is_not_kept(store: Path) -> None:
    opened = FeatureStore.open(store)
    assert opened in background_refresh._stores
    del opened
    eventually(
        lambda: store not in {getattr(kept, "path", None) for kept in list(background_refresh._stores)}, "its end"
    )
