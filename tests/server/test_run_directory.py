"""Files that are removed from the run directory of a running server are created again by the same processes."""

import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from shoal.engine.process.control import writer_answers
from shoal.engine.process.handover import Predecessor
from shoal.engine.root.export_root import ExportRoot
from tests import stores
from tests.every_type import USERS, user_rows
from tests.server.serving import Connection, Server, eventually

LOOKUP = {"features": ["users:score"], "entities": {"users_id": [1, 2]}}
PUSH = {"view": "users", "rows": {"users_id": [1], "score": [0.5]}}
PARTS = {
    "metrics",
    "scrubbed.json",
    "server.json",
    "server.lock",
    "standing.json",
    "supervisor.sock",
    "writer.lock",
    "writer.sock",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on a store with a path that is too long for the address of a Unix socket."""
    directory = tmp_path_factory.mktemp("run") / ("long" * 40)
    root = ExportRoot(directory / "root")
    stores.publish_snapshot(root, USERS, user_rows(10))
    stores.load(directory / "store", root)
    with Server(directory / "store", {"root": str(root)}) as server:
        server.await_ready()
        yield server


def has_all(run: Path) -> bool:
    return run.is_dir() and {part.name for part in run.iterdir()} >= PARTS and writer_answers(run.parent)


def lookups_counted(connection: Connection) -> float:
    """Return the number of lookups that all workers have counted."""
    answer = connection.ask("GET", "/metrics")
    assert answer.status == 200, answer.body
    counts = re.findall(r'^shoal_request_duration_seconds_count\{.*"/v1/lookup".* (\S+)$', answer.body.decode(), re.M)
    return sum(map(float, counts))


def counts(connection: Connection) -> bool:
    before = lookups_counted(connection)
    assert connection.ask("POST", "/v1/lookup", LOOKUP).status == 200
    return lookups_counted(connection) > before


def is_replaceable(store: Path) -> bool:
    found = Predecessor.find(store)
    if found is not None:
        found.close()
    return found is not None


def test_what_is_removed_comes_back(server: Server) -> None:
    store = server.store
    run = server.store / "run"
    before = server.record
    eventually(partial(has_all, run), "all parts")
    with server.connection() as connection:
        for pattern in (*sorted(PARTS), "metrics/counter_*", "."):
            removed = next(run.glob(pattern)) if pattern != "." else run
            if removed.is_dir():
                shutil.rmtree(removed)
            else:
                removed.unlink()
            # No request fails in the meantime.
            for method, path, body in (
                ("POST", "/v1/push", PUSH),
                ("POST", "/v1/lookup", LOOKUP),
                ("GET", "/metrics", None),
                ("GET", "/ready", None),
            ):
                answer = connection.ask(method, path, body)
                assert answer.status == 200, (removed, path, answer.body, server.log)
            eventually(partial(has_all, run), f"all parts, after {removed} was removed")
            eventually(partial(counts, connection), f"counters, after {removed} was removed")
        assert connection.ask("POST", "/v1/reload", {}).status == 200
    assert stat.S_IMODE(run.stat().st_mode) == 0o700
    eventually(partial(is_replaceable, store), "the supervisor's socket")
    # The new lock files are locked.
    for command, refusal in (
        (["shoal", "load", "--store", store, "--from", store.parent / "root"], f"written by process {before.writer}"),
        (["tests.server.serve", f'{{"store": "{store}", "port": 0}}', "null"], "ServerRunning"),
    ):
        refused = subprocess.run([sys.executable, "-m", *map(str, command)], capture_output=True, text=True)
        assert refusal in refused.stderr
    assert server.record == before, server.log
    assert "Traceback" not in server.log
