"""Processes of several PID namespaces on one store, as in containers that share a volume."""

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

from shoal.engine.root.export_root import ExportRoot
from shoal.engine.store.environment import open_live
from tests import stores
from tests.every_type import USERS, user_rows
from tests.server.serving import Answer, Connection, eventually

LOOKUP = {"features": ["users:score"], "entities": {"users_id": [1, 2]}}
IN_NAMESPACE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable]
READ_AS = r"""
import os, sys, time
from pathlib import Path
from shoal.engine.store.environment import ReadTransaction, open_live
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
    """Run processes of another namespace that read the store under each process id of a range, and kill them at the
    end."""
    command = [*IN_NAMESPACE, "-c", READ_AS, str(store), str(first), str(last)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as readers:
        assert readers.stdout is not None
        try:
            assert {int(readers.stdout.readline()) for _ in range(first, last + 1)} == set(range(first, last + 1))
            yield
        finally:
            readers.kill()


def lookup_as(pid: int, store: Path) -> subprocess.CompletedProcess[str]:
    """Run `shoal lookup` in another namespace, in a process with this id."""
    command = ["-m", "shoal", "lookup", "--store", str(store), "--features", "users:score", "--key", "users_id=1"]
    return subprocess.run([*IN_NAMESPACE, "-c", RUN_AS, str(pid), *command], capture_output=True, text=True)


class ContainedServer:
    """A server that is process 1 of its own namespace. Its other processes have ids from `first` upwards."""

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
        """Return the process ids of the workers and the writer in the server's namespace."""
        record = json.loads((self.store / "run" / "server.json").read_text())
        return [*record["workers"], record["writer"]]


def versions_read_as(pid: int, store: Path) -> set[int]:
    """Return the versions that the slots in LMDB's table of readers hold for a process id."""
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
            # The readers already have all the ids that the server's processes would get first.
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
        # The reader slots of the killed processes now seem to belong to the processes that reuse their ids.
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
    """Assert that process 1 reaps the orphans of a command in the container (`kubectl exec`)."""
    supervisor = server.supervisor

    def orphans() -> list[psutil.Process]:
        return [child for child in supervisor.children() if child.name() == "sleep"]

    enter = ["nsenter", "--target", str(supervisor.pid), "--pid", "sh", "-c", "sleep 3600 &"]
    subprocess.run(enter, check=True, stdout=subprocess.DEVNULL)
    (orphan,) = eventually(orphans, "an orphan")
    os.kill(orphan.pid, signal.SIGKILL)
    eventually(lambda: not orphans(), "that it is reaped")
    assert server.ask("POST", "/v1/lookup", LOOKUP).status == 200
