"""Processes of several PID namespaces, as containers that share a volume have, on one store."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from engine.environment import open_live
from engine.export_root import ExportRoot
from tests import stores
from tests.every_type import USERS, user_rows
from tests.server.serving import Answer, Connection, eventually

LOOKUP = {"features": ["users:score"], "entities": {"users_id": [1, 2]}}
IN_NAMESPACE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable]
READ_AS = r"""
import os, sys, time
from pathlib import Path
from engine.environment import ReadTransaction, open_live
store, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
for number in range(last, first - 1, -1):  # Threads take ids too: those behind.
    Path("/proc/sys/kernel/ns_last_pid").write_text(str(number - 1))
    if not os.fork():
        reading = ReadTransaction(open_live(store))
        os.write(1, f"{os.getpid()}\n".encode())
        time.sleep(3600)
time.sleep(3600)
"""
SERVE_AS = """
import os, sys
from pathlib import Path
Path("/proc/sys/kernel/ns_last_pid").write_text(str(int(sys.argv[1]) - 1))
os.execv(sys.executable, [sys.executable, "-m", "tests.server.serve", *sys.argv[2:]])
"""
RUN_AS = """
import os, sys
from pathlib import Path
Path("/proc/sys/kernel/ns_last_pid").write_text(str(int(sys.argv[1]) - 1))
if not (child := os.fork()):
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tried = subprocess.run([*IN_NAMESPACE, "-c", RUN_AS, "7", "-c", ""], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no process id can be chosen in a namespace of its own here: {tried.stderr.strip()}")
    directory = tmp_path_factory.mktemp("namespaces")
    root = ExportRoot(directory / "root")
    stores.publish_snapshot(root, USERS, user_rows(10))
    stores.load(directory / "store", root)
    return directory / "store"


@contextmanager
def reading(store: Path, first: int, last: int) -> Iterator[None]:
    """Processes of another namespace read the store, under all process ids of a range. In the end they are killed."""
    command = [*IN_NAMESPACE, "-c", READ_AS, str(store), str(first), str(last)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as readers:
        assert readers.stdout is not None
        try:
            assert {int(readers.stdout.readline()) for _ in range(first, last + 1)} == set(range(first, last + 1))
            yield
        finally:
            readers.kill()


def lookup_as(pid: int, store: Path) -> subprocess.CompletedProcess[str]:
    """Look up by the command line, in a process of another namespace that has this id."""
    command = ["-m", "cli", "lookup", "--store", str(store), "--features", "users:score", "--key", "users_id=1"]
    return subprocess.run([*IN_NAMESPACE, "-c", RUN_AS, str(pid), *command], capture_output=True, text=True)


class ContainedServer:
    """A server that is process 1 of its namespace, and whose other processes have ids from `first` on."""

    def __init__(self, store: Path, first: int) -> None:
        self.store = store
        self.log_path = store.parent / "server.log"
        self._socket = store.parent / "server.sock"
        settings = {"store": str(store), "unix_socket": str(self._socket), "workers": 2, "request_timeout_ms": 60_000}
        serve = ["-c", SERVE_AS, str(first), json.dumps(settings), json.dumps({"root": None})]
        with self.log_path.open("w") as log:
            self.unshare = subprocess.Popen([*IN_NAMESPACE, *serve], stderr=log)

    def is_ready(self) -> bool:
        return self._socket.exists() and self.ask("GET", "/ready").status == 200

    def ask(self, method: str, path: str, body: object = None) -> Answer:
        connection = Connection(f"unix:{self._socket}")
        try:
            return connection.ask(method, path, body)
        finally:
            connection.close()

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    @property
    def supervisor(self) -> psutil.Process:
        return psutil.Process(self.unshare.pid).children()[0]

    def recorded(self) -> list[int]:
        """The process ids of the workers and the writer, in their namespace."""
        record = json.loads((self.store / "run" / "server.json").read_text())
        return [*record["workers"], record["writer"]]


def versions_read_as(pid: int, store: Path) -> set[int]:
    """The versions that slots of LMDB's table of readers hold under a process id."""
    slots = [line.split() for line in open_live(store).env.readers().splitlines()[1:]]
    return {int(version) for holder, _, version in slots if int(holder) == pid and version != "-"}


def push(server: ContainedServer, score: float) -> Answer:
    rows = {"users_id": [1], "score": [score]}
    answer = server.ask("POST", "/v1/push", {"view": "users", "rows": rows})
    assert answer.status == 200, answer.body
    return answer


def test_namespaces_that_use_the_same_process_ids(store: Path) -> None:
    first, last = 200, 207
    with reading(store, first, last):
        server = ContainedServer(store, first)
        try:
            # All the ids that its processes would have had are taken.
            eventually(server.is_ready, lambda: server.log)
            push(server, 7.0)
            assert min(server.recorded()) > last
            for _ in range(20):
                assert server.ask("POST", "/v1/lookup", LOOKUP).json["features"] == {"users:score": [7.0, 0.5]}
            assert "is started again under another process id" in server.log
            assert "cannot go on" not in server.log
            before = server.recorded()
            refused = lookup_as(before[0], store)
            assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
            assert refused.stderr.startswith("shoal: ")
            assert "shareProcessNamespace" in refused.stderr
            answered = lookup_as(max(before) + 100, store)
            assert (answered.returncode, answered.stderr) == (0, "")
            assert server.ask("POST", "/v1/lookup", LOOKUP).status == 200
            assert server.recorded() == before
        except BaseException:
            server.unshare.kill()
            raise
    try:
        # What those who were killed held seems to be held by those who now have their ids.
        old = versions_read_as(first, store)
        newest = push(server, 8.0).json["version"]
        with reading(store, first, first):
            assert versions_read_as(first, store) == {newest}
        assert old < {newest} or max(old) < newest
        assert_orphans_are_reaped(server)
        server.supervisor.terminate()
        assert server.unshare.wait(60) == 0
    finally:
        server.unshare.kill()


def assert_orphans_are_reaped(server: ContainedServer) -> None:
    """What a command in the container (`kubectl exec`) leaves behind becomes a child of process 1."""
    supervisor = server.supervisor

    def orphans() -> list[psutil.Process]:
        return [child for child in supervisor.children() if child.name() == "sleep"]

    enter = ["nsenter", "--target", str(supervisor.pid), "--pid", "sh", "-c", "sleep 3600 &"]
    subprocess.run(enter, check=True, stdout=subprocess.DEVNULL)
    (orphan,) = eventually(orphans, "an orphan")
    os.kill(orphan.pid, signal.SIGKILL)
    eventually(lambda: not orphans(), "that it is reaped")
    assert server.ask("POST", "/v1/lookup", LOOKUP).status == 200
