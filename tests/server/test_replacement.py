"""A server that replaces another one on the same store: no client request fails, whatever happens to the new server."""

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from shoal.engine.base.errors import ReplacementFailed
from shoal.engine.process.handover import Predecessor
from shoal.engine.process.run_directory import read_server_record
from shoal.engine.root.export_root import ExportRoot
from tests import stores
from tests.every_type import USERS, user_rows
from tests.server.serving import Connection, Server, eventually

CODE = Path(__file__).parents[2]
LOOKUP: dict[str, Any] = {"features": ["users:score"], "entities": {"users_id": [1, 2]}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> ExportRoot:
    root = ExportRoot(tmp_path_factory.mktemp("replacement") / "root")
    stores.publish_snapshot(root, USERS, user_rows(10))
    return root


@pytest.fixture
def store(root: ExportRoot, tmp_path: Path) -> Path:
    stores.load(tmp_path / "store", root)
    return tmp_path / "store"


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another release: a copy of the code and its compiled files in another directory."""
    directory = tmp_path_factory.mktemp("release")
    for part in ("shoal", "tests"):
        shutil.copytree(CODE / part, directory / part)
    return directory


class Client(threading.Thread):
    """A client that repeats a request until it is stopped, over one kept connection or over a new one each time. Every
    answer other than 200 is a failure."""

    def __init__(self, address: str, path: str, body: dict[str, Any], *, keeps: bool) -> None:
        super().__init__(daemon=True)
        self._address = address
        self._path = path
        self._body = body
        self._keeps = keeps
        self._ended = threading.Event()
        self.answered = 0
        self.failures: list[str] = []

    def run(self) -> None:
        connection = None
        while not self._ended.wait(0.005):
            try:
                connection = connection or Connection(self._address)
                answer = connection.ask("POST", self._path, self._body)
                if answer.status == 200:
                    self.answered += 1
                else:
                    self.failures.append(f"{answer.status}: {answer.body!r}")
                if not self._keeps or answer.headers.get("connection") == "close":
                    connection.close()
                    connection = None
            except Exception as error:
                self.failures.append(repr(error))
                connection = None

    def stop(self) -> None:
        self._ended.set()
        self.join()


@contextmanager
def clients(server: Server) -> Iterator[list[Client]]:
    """Run clients with lookups and pushes, and assert that none of their requests fails."""
    address = server.record.address
    push = {"view": "users", "rows": {"users_id": [3], "score": [0.5]}}
    running = [
        Client(address, "/v1/lookup", LOOKUP, keeps=True),
        Client(address, "/v1/lookup", LOOKUP, keeps=False),
        Client(address, "/v1/push", push, keeps=True),
        Client(address, "/v1/push", push, keeps=False),
    ]
    for client in running:
        client.start()
    try:
        eventually(lambda: all(client.answered for client in running), "answers")
        yield running
        before = [client.answered for client in running]
        eventually(
            lambda: all(client.answered > count for client, count in zip(running, before, strict=True)), "answers still"
        )
    finally:
        for client in running:
            client.stop()
    assert [client.failures for client in running] == [[], [], [], []]


def test_no_request_fails_when_a_server_is_replaced_again_and_again(
    store: Path, root: ExportRoot, release: Path
) -> None:
    with ExitStack() as closing:
        old = closing.enter_context(Server(store, {"root": str(root)}))
        old.await_ready()
        with clients(old):
            # An upgrade, and a rollback.
            for code in (release, CODE):
                new = closing.enter_context(Server(store, {"root": str(root)}, code=code, replace=True))
                assert new.record.pid == new.process.pid
                assert old.process.wait(30) == 0
                assert new.record.address == old_address(old)
                old = new
        eventually(lambda: old.ask("GET", "/ready").status == 200, "the last server")
        assert read_server_record(store) is not None
        # A writer that hands over stops in order, so only the first writer may have to verify the whole store.
        assert old.log.count("the store was not closed cleanly") <= 1
        # The writer of the last server follows the root.
        stores.publish_delta(root, USERS, [{"users_id": 1, "score": 8.0, stores.TIMESTAMP: stores.NOW}])
        eventually(lambda: old.lookup(**LOOKUP).json["features"]["users:score"][0] == 8.0, "the delta")


def old_address(server: Server) -> str:
    return server.log.partition("listening on ")[2].split()[0]


@pytest.mark.parametrize("broken", ["shoal/engine/server/worker.py", "shoal/loaders/writer.py"])
def test_a_release_that_does_not_start_leaves_the_old_one_as_it_was(
    store: Path, root: ExportRoot, release: Path, tmp_path: Path, broken: str
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(release, bad)
    source = bad / broken
    name = "async def _keep_up(" if "worker" in broken else "async def _run("
    source.write_text(source.read_text().replace(name, "raise_at_call = 1\n\n\nasync def _was("))
    with Server(store, {"root": str(root)}) as old:
        old.await_ready()
        with clients(old):
            new = Server(store, {"root": str(root)}, code=bad, replace=True)
            assert new.process.wait(60) == 1, new.log
            assert "ReplacementFailed" in new.log
            assert "the old server continues to serve" in new.log
            eventually(lambda: old.record.writer, "a writer of the old server")
        assert old.record.pid == old.process.pid
        assert old.process.poll() is None


def test_a_new_server_that_dies_half_way_leaves_the_old_one_as_it_was(store: Path, root: ExportRoot) -> None:
    with Server(store, {"root": str(root)}) as old:
        old.await_ready()
        with clients(old):
            for _ in range(2):
                new = Predecessor.find(store)
                assert new is not None
                assert new.inheritance.address == old.record.address
                with pytest.raises(ReplacementFailed, match="another server may be about to replace it"):
                    Predecessor.find(store, patience=0.5)
                new.order("writer")
                assert eventually(new.poll, "the end of the old writer") == "done"
                # The system closes the descriptors of a process that dies, as these lines do.
                inheritance = new.inheritance
                for descriptor in (inheritance.lock, inheritance.http):
                    os.close(descriptor)
                new.close()
                eventually(lambda: old.record.writer, "a writer again")


def test_a_server_with_none_to_replace_just_starts(store: Path, root: ExportRoot) -> None:
    with Server(store, {"root": str(root)}, replace=True) as server:
        server.await_ready()
        server.kill()
    # The files of the killed server do not block the next one.
    with Server(store, {"root": str(root)}, replace=True) as server:
        server.await_ready()


def test_a_unix_socket_is_handed_over_and_removed_by_the_last(store: Path, tmp_path: Path) -> None:
    path = tmp_path / "shoal.sock"
    with Server(store, unix_socket=str(path)) as old:
        old.await_ready()
        with Server(store, unix_socket=str(path), replace=True) as new:
            new.await_ready()
            assert old.process.wait(30) == 0
            assert new.lookup(**LOOKUP).status == 200
        assert not path.exists()


def test_kept_connections_are_told_to_close_before_they_are_closed(store: Path) -> None:
    with Server(store) as old, old.connection() as kept:
        assert kept.ask("GET", "/health").status == 200
        with Server(store, replace=True):
            eventually(lambda: "another server has taken over" in old.log, "the end of the old server")
            answer = kept.ask("POST", "/v1/lookup", LOOKUP)
            assert (answer.status, answer.headers["connection"]) == (200, "close")
