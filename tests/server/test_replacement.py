"""A server takes the place of another on the same store: nothing that clients ask fails, whatever becomes of the new
one."""

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ReplacementFailed
from engine.export_root import ExportRoot
from engine.handover import Predecessor
from engine.run_directory import read_server_record
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
    """Another release: the same code, with what was compiled of it, in a directory of its own."""
    directory = tmp_path_factory.mktemp("release")
    for part in ("engine", "loaders", "tests"):
        shutil.copytree(CODE / part, directory / part)
    return directory


class Client(threading.Thread):
    """Asks again and again, over a connection that it keeps or over a new one each time, until it is stopped; what is
    not answered with 200 has failed."""

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
    """Lookups and pushes, none of which may fail."""
    address, push = server.record.address, {"view": "users", "rows": {"users_id": [3], "score": [0.5]}}
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
            # A release, and back.
            for code in (release, CODE):
                new = closing.enter_context(Server(store, {"root": str(root)}, code=code, replace=True))
                assert new.record.pid == new.process.pid
                assert old.process.wait(30) == 0
                assert new.record.address == old_address(old)
                old = new
        eventually(lambda: old.ask("GET", "/ready").status == 200, "the last server")
        assert read_server_record(store) is not None
        # A writer that makes room for the next one stops in order: at most the first had all of the store verified.
        assert old.log.count("the store was not closed in order") <= 1
        # Its writer follows the root.
        stores.publish_delta(root, USERS, [{"users_id": 1, "score": 8.0, stores.TIMESTAMP: stores.NOW}])
        eventually(lambda: old.lookup(**LOOKUP).json["features"]["users:score"][0] == 8.0, "the delta")


def old_address(server: Server) -> str:
    return server.log.partition("listening on ")[2].split()[0]


@pytest.mark.parametrize("broken", ["engine/server/worker.py", "loaders/writer.py"])
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
            assert "the server that was to be replaced goes on" in new.log
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
                with pytest.raises(ReplacementFailed, match="another one may be about to take its place"):
                    Predecessor.find(store, patience=0.5)
                new.order("writer")
                assert eventually(new.poll, "the end of the old writer") == "done"
                # What is passed to a process that dies is closed, as this is.
                inheritance = new.inheritance
                for descriptor in (inheritance.lock, inheritance.http):
                    os.close(descriptor)
                new.close()
                eventually(lambda: old.record.writer, "a writer again")


def test_a_server_with_none_to_replace_just_starts(store: Path, root: ExportRoot) -> None:
    with Server(store, {"root": str(root)}, replace=True) as server:
        server.await_ready()
        server.kill()
    # What the dead one left is in nobody's way.
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
