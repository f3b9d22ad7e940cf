"""A process of a server is killed at any step of its start: no process is left behind, and the next server serves."""

import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from shoal.engine.process.run_directory import read_server_record
from shoal.engine.root.export_root import ExportRoot
from tests import stores
from tests.failpoints.processes import running, serve
from tests.server.serving import Connection, eventually

VIEW = stores.schema("doc", key="int64", a="int64")
OF_THE_SERVER = (
    "server.locked",
    "server.bound",
    "server.forked",
    "server.forked:3",
    "server.record-aside",
    "server.recorded",
)
OF_WORKERS = ("worker.begun", "worker.opened", "worker.accepting")
OF_THE_WRITER = ("writer.locked", "writer.listening")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExportRoot]:
    """A store, and the root that it follows."""
    directory = tmp_path_factory.mktemp("server")
    root = ExportRoot(directory / "root")
    stores.publish_snapshot(root, VIEW, [{"doc_id": 1, "a": 1}])
    stores.load(directory / "store", root)
    return directory / "store", root


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def holders(store: Path) -> Iterator[int]:
    """Yield the ids of the processes that have a lock file of the store's server or writer open."""
    locks = {str(store / "run" / name) for name in ("server.lock", "writer.lock")}
    for process in psutil.process_iter():
        try:
            if locks & {file.path for file in process.open_files()}:
                yield process.pid
        except psutil.Error:
            continue


def assert_serves(store: Path, root: ExportRoot, log: Path) -> None:
    """Assert that a server without a failpoint serves the store and applies a new entry."""
    with running(serve, store, root.path, die_at=None, log=log) as server:
        eventually(lambda: (record := read_server_record(store)) and record.pid == server.pid, log.read_text)
        seq = stores.publish_delta(root, VIEW, [{"doc_id": 1, "a": 1}]).seq
        eventually(lambda: _applied(store) == seq, log.read_text)
        assert server.pid is not None
        psutil.Process(server.pid).send_signal(signal.SIGTERM)
        server.join(30)
        assert server.exitcode == 0, log.read_text()
    assert list(holders(store)) == []
    assert sorted(path.name for path in (store / "run").iterdir() if path.suffix == ".tmp") == []


def _applied(store: Path) -> int | None:
    record = read_server_record(store)
    assert record is not None
    connection = Connection(record.address)
    try:
        answer = connection.ask("GET", "/v1/status").json
    finally:
        connection.close()
    return answer["views"][0]["applied_seq"] if answer["views"] else None


@pytest.mark.parametrize("point", OF_THE_SERVER)
def test_a_supervisor_that_is_killed_while_it_starts(point: str, loaded: tuple[Path, ExportRoot], log: Path) -> None:
    store, root = loaded
    with running(serve, store, root.path, die_at=point, log=log) as server:
        server.join(30)
        assert server.exitcode == -signal.SIGKILL, log.read_text()
    eventually(lambda: list(holders(store)) == [], "the end of all its children")
    assert_serves(store, root, log)


@pytest.mark.parametrize("point", [*OF_WORKERS, *OF_THE_WRITER])
def test_children_that_are_killed_whenever_they_start(point: str, loaded: tuple[Path, ExportRoot], log: Path) -> None:
    """The supervisor keeps trying, with longer and longer pauses, and ends when it is told to."""
    store, root = loaded
    name = point.partition(".")[0]
    with running(serve, store, root.path, die_at=point, log=log) as server:
        eventually(lambda: log.exists() and log.read_text().count("was ended by SIGKILL") > 3, "some deaths")
        died = [line for line in log.read_text().splitlines() if "was ended by SIGKILL" in line]
        assert [line for line in died if f" {name}" not in line] == []
        assert server.pid is not None
        psutil.Process(server.pid).send_signal(signal.SIGTERM)
        server.join(30)
        assert server.exitcode == 0, log.read_text()
    assert list(holders(store)) == []
    assert_serves(store, root, log)
