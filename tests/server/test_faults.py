"""Faults of a running server's store, disk or root: good views are served, damaged ones are reported, and the server
recovers by itself."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from shoal.engine.format.paths import live_path
from shoal.engine.root.export_root import ExportRoot
from tests import stores
from tests.damage import base_path, harm
from tests.server.serving import Answer, Server, eventually

DOC = stores.schema("doc", key="int64", a="int64", text="string")
OTHER = stores.schema("other", key="int64", a="int64")
KEYS = {"doc_id": [1], "other_id": [1]}


def rows(value: int) -> list[stores.Row]:
    return [{"doc_id": number, "a": value, "text": f"{number}" * 500} for number in range(2000)]


@pytest.fixture
def root(tmp_path: Path) -> ExportRoot:
    root = ExportRoot(tmp_path / "root")
    stores.publish_snapshot(root, DOC, rows(1))
    stores.publish_delta(root, DOC, [{"doc_id": 1, "a": 2}])
    stores.publish_snapshot(root, OTHER, [{"other_id": 1, "a": 1}])
    return root


def seen(server: Server, view: str) -> Any:
    answer = server.lookup([f"{view}:a"], KEYS)
    assert answer.status == 200, answer.body
    return answer.json["features"][f"{view}:a"][0]


def gauge(server: Server, name: str) -> str:
    metrics = server.ask("GET", "/metrics").body.decode().splitlines()
    return next(line.rpartition(" ")[2] for line in metrics if line.startswith(name))


def test_a_damaged_view_is_named_everywhere_and_the_others_are_served(store: Path) -> None:
    harm(store, "doc", "base cut")
    with Server(store) as server:
        server.await_ready()
        assert seen(server, "other") == 1
        refused = server.lookup(["other:a", "doc:a"], KEYS)
        assert (refused.status, refused.error[0]) == (503, "ViewDamaged")
        assert "view 'doc' cannot be served: generation " in refused.error[1]
        assert "`shoal load` loads the view again" in refused.error[1]
        feast = server.ask("POST", "/get-online-features", {"features": ["doc:a"], "entities": {"doc_id": [1]}})
        assert feast.status == 503
        status = {view["name"]: view for view in server.ask("GET", "/v1/status").json["views"]}
        assert "it was cut short" in status["doc"]["damage"]
        assert gauge(server, 'shoal_view_damaged{view="doc"}') == "1.0"
        assert gauge(server, 'shoal_view_damaged{view="other"}') == "0.0"
        # The only remaining view is damaged too, so nothing can be served.
        harm(store, "other", "base missing")
    with Server(store) as server:
        answer = server.ask("GET", "/ready")
        assert (answer.status, answer.error[0]) == (503, "ViewDamaged")


def attempt(ask: Callable[[], Answer]) -> Answer | None:
    """Return an answer, or None if the worker dies during the request."""
    with suppress(OSError):
        return ask()
    return None


def test_a_base_that_is_cut_short_under_a_server_is_loaded_again(store: Path, root: ExportRoot) -> None:
    with Server(store, {"root": str(root)}) as server:
        server.await_ready()
        os.truncate(base_path(store, "doc"), 4096)

        def whole_again() -> bool:
            # Workers that have the file mapped are killed when they read a missing page. A memory map offers no other
            # way.
            answer = attempt(lambda: server.lookup(["doc:a", "doc:text"], {"doc_id": [1, 1999]}))
            return answer is not None and answer.status == 200 and answer.json["features"]["doc:a"] == [2, 1]

        eventually(whole_again, "the view, loaded again")
        eventually(lambda: gauge(server, 'shoal_view_damaged{view="doc"}') == "0.0", "the end of the damage")
        eventually(lambda: len(server.record.workers) == 2, "both workers")
        stores.publish_delta(root, DOC, [{"doc_id": 1, "a": 3}])
        eventually(lambda: seen(server, "doc") == 3, "the next delta")
        assert seen(server, "other") == 1


def test_a_store_whose_catalog_is_cut_short_is_one_error_that_says_what_to_do(store: Path, root: ExportRoot) -> None:
    os.truncate(live_path(store) / "data.mdb", 8192)
    with Server(store, {"root": str(root)}) as server:
        answer = server.lookup(["doc:a"], KEYS)
        assert (answer.status, answer.error[0]) == (503, "StoreDamaged")
        assert "it was cut short; restore a backup" in answer.error[1]
        eventually(lambda: "writer cannot go on: StoreDamaged: " in server.log, "the writer's complaint")
        assert "Traceback" not in server.log
        # The operator runs the command while the server is up; the supervisor keeps trying to start a new writer.
        subprocess.run([sys.executable, "-m", "shoal", "store", "accept-loss", "--store", str(store)], check=True)
        eventually(lambda: attempt(lambda: server.ask("GET", "/ready")).status == 200, "a store, loaded anew")  # type: ignore[union-attr]
        eventually(lambda: server.lookup(["doc:a"], KEYS).json.get("features") == {"doc:a": [2]}, "all of it")


def test_a_store_that_is_deleted_under_a_server_is_served_on(store: Path, root: ExportRoot) -> None:
    with Server(store) as server:
        server.await_ready()
        with server.connection() as connection:
            shutil.rmtree(store)
            for _ in range(3):
                body = {"features": ["doc:a", "doc:text"], "entities": {"doc_id": [1, 1999]}}
                assert connection.ask("POST", "/v1/lookup", body).json["features"]["doc:a"] == [2, 1]
                time.sleep(0.6)
    stores.load(store, root)
    with Server(store) as server:
        server.await_ready()
        assert seen(server, "doc") == 2


def test_a_worker_without_descriptors_serves_on_and_accepts_again_later(store: Path) -> None:
    with Server(store, workers=1) as server:
        server.await_ready()
        (pid,) = server.record.workers
        worker = psutil.Process(pid)
        with server.connection() as connection:
            assert connection.ask("GET", "/health").status == 200
            before = worker.rlimit(resource.RLIMIT_NOFILE)
            worker.rlimit(resource.RLIMIT_NOFILE, (worker.num_fds(), before[1]))
            waiting = [server.raw_socket() for _ in range(20)]
            eventually(lambda: "connections cannot be accepted" in server.log, "a connection that is refused")
            assert connection.ask("POST", "/v1/lookup", {"features": ["doc:a"], "entities": KEYS}).status == 200
            worker.rlimit(resource.RLIMIT_NOFILE, before)
            # The clients that connected in the meantime had to wait, and are served now.
            for client in waiting:
                client.sendall(b"GET /health HTTP/1.1\r\nHost: shoal\r\nConnection: close\r\n\r\n")
                assert client.makefile("rb").read().startswith(b"HTTP/1.1 200 OK")
                client.close()
        assert server.record.workers == (pid,)


def test_a_worker_without_room_for_its_counters_serves_on(store: Path) -> None:
    (store / "run").mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=256k,mode=700", "tmpfs", str(store / "run")]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        with Server(store) as server:
            server.await_ready()
            assert seen(server, "doc") == 2
            assert server.log.count("the counts of this worker will be missing from /metrics") == 2
            assert gauge(server, "shoal_store_version") != "0"
            assert len(set(server.record.workers)) == 2
    finally:
        subprocess.run(["umount", "--lazy", store / "run"], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", path], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


def test_a_server_whose_disk_is_full_goes_on_and_recovers_by_itself(disk: Path, root: ExportRoot) -> None:
    stores.load(disk / "store", root)
    push = {"view": "doc", "rows": {"doc_id": [1], "a": [3]}}
    with Server(disk / "store", {"root": str(root)}) as server:
        server.await_ready()
        ballast = disk / "ballast"
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free)
        assert gauge(server, "shoal_disk_free_bytes") == "0.0"
        # The first pushes may still fit into free pages of earlier commits.
        pushed = [server.ask("POST", "/v1/push", push) for _ in range(5)][-1]
        assert (pushed.status, pushed.error[0]) == (507, "StoreFull")
        before = server.record
        assert before.writer is not None
        os.kill(before.writer, signal.SIGKILL)
        eventually(lambda: server.log.count("writer started") == 2, "another writer")
        # There is no room for the record with the new writer's process id either.
        time.sleep(0.5)
        assert "the server's record cannot be written" in server.log
        assert seen(server, "other") == 1
        ballast.unlink()
        eventually(lambda: server.record.writer not in (None, before.writer), "a record of the writer that there is")
        assert server.ask("POST", "/v1/push", push).status == 200
        assert seen(server, "doc") == 3
