"""Processes that hold an old version of a store: they move on if they can, and are named if they cannot."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine import FeatureStore, keeping_up
from engine.environment import DATA, live_path
from engine.export_root import ExportRoot
from engine.live_status import describe_live
from loaders.push import push_rows
from loaders.store_writer import StoreWriter
from tests import stores
from tests.server.serving import eventually

DOC = stores.schema("doc", key="int64", a="int64")
READER = """
import sys
from engine import FeatureStore
store = FeatureStore.open(sys.argv[1])
store.lookup(["doc:a"], {"doc_id": [1]})
print("open", flush=True)
sys.stdin.read()
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


def push(store: Path, times: int) -> None:
    with StoreWriter(store) as writer:
        for number in range(times):
            push_rows(writer, "doc", {"doc_id": [number % 100], "a": [number]})


def size(store: Path) -> int:
    return (live_path(store) / DATA).stat().st_size


def status(store: Path) -> str:
    """What `shoal status` says, in a process of its own, as one that writes is no reader."""
    command = [sys.executable, "-m", "cli", "status", "--store", str(store)]
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
        # What it held is used again.
        push(store, 200)
        assert size(store) < held + (1 << 20)
        assert describe_live(store)["oldest_reader"] is None
        assert "holds a version" not in status(store)


def test_an_idle_store_moves_on_by_itself(store: Path) -> None:
    with reader(store) as process:
        push(store, 5)
        assert process.poll() is None
        eventually(lambda: describe_live(store)["oldest_reader"] is None, "the reader's moving on")


def test_a_store_that_is_let_go_is_not_kept(store: Path) -> None:
    opened = FeatureStore.open(store)
    assert opened in keeping_up._stores
    del opened
    eventually(lambda: store not in {getattr(kept, "path", None) for kept in list(keeping_up._stores)}, "its end")
