"""A store that is moved, deleted or replaced under a running server: lookups continue, and no write is acknowledged
that the next process would not find."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shoal.engine.format.paths import DATA, live_path
from shoal.engine.root.export_root import ExportRoot
from tests import stores
from tests.server.serving import Answer, Connection, Server, eventually

DOC = stores.schema("doc", key="int64", a="int64").model_copy(update={"push_source": "docs"})

AS_JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> ExportRoot:
    root = ExportRoot(tmp_path_factory.mktemp("moved") / "root")
    stores.publish_snapshot(root, DOC, [{"doc_id": number, "a": 1} for number in range(10)])
    return root


@pytest.fixture(scope="module")
def loaded(root: ExportRoot) -> Path:
    store = Path(str(root)).with_name("loaded")
    stores.load(store, root)
    return store


@pytest.fixture
def store(loaded: Path, tmp_path: Path) -> Path:
    shutil.copytree(loaded, tmp_path / "store", ignore=shutil.ignore_patterns("run", "lock.mdb"))
    return tmp_path / "store"


@contextmanager
def serving(store: Path, root: ExportRoot) -> Iterator[tuple[Server, Connection]]:
    """Run a server, and yield it with an open connection. The server's address is in the store, which may be moved."""
    with Server(store, {"root": str(root)}, workers=1) as server, server.connection() as connection:
        yield server, connection


def is_ready(connection: Connection) -> bool:
    return connection.ask("GET", "/ready").status == 200


def push(connection: Connection, value: int, key: str | None = None) -> Answer:
    headers = {"Idempotency-Key": key} if key else {}
    rows = {"doc_id": [1], "a": [value]}
    return connection.ask("POST", "/v1/push", {"view": "doc", "rows": rows}, **headers)


def seen(connection: Connection) -> list[int]:
    answer = connection.ask("POST", "/v1/lookup", {"features": ["doc:a"], "entities": {"doc_id": [1]}})
    assert answer.status == 200, answer.body
    values: list[int] = answer.json["features"]["doc:a"]
    return values


def move(source: Path, target: Path) -> Callable[[], None]:
    """Move a path, and return a function that moves it back."""
    source.rename(target)

    def back() -> None:
        if source.is_dir():
            shutil.rmtree(source)
        target.rename(source)

    return back


def put_a_copy_in_place(path: Path) -> Callable[[], None]:
    """Replace a path by a copy in other files, as a restore or a new disk does, and return a function that moves it
    back."""
    copy = path.with_name("copy")
    if path.is_dir():
        shutil.copytree(path, copy, ignore=shutil.ignore_patterns("run"))
    else:
        shutil.copyfile(path, copy)
    back = move(path, path.with_name("aside"))
    copy.rename(path)
    return back


def delete(store: Path) -> None:
    shutil.rmtree(store)


def move_and_make(store: Path) -> Callable[[], None]:
    back = move(store, store.with_name("elsewhere"))
    store.mkdir()
    return back


AWAY: dict[str, Callable[[Path], Callable[[], None] | None]] = {
    "live moved": lambda store: move(store / "live", store / "elsewhere"),
    "only data.mdb renamed": lambda store: move(live_path(store) / DATA, store / "data"),
    "data.mdb replaced": lambda store: put_a_copy_in_place(live_path(store) / DATA),
    "the store moved": lambda store: move(store, store.with_name("elsewhere")),
    "the store moved, and a directory made": move_and_make,
    "the store replaced by a copy": put_a_copy_in_place,
}


def refusals(connection: Connection) -> dict[str, Answer]:
    """Return the answers to all requests that must not be acknowledged."""
    frame = {"doc_id": [1], "a": [-1], "event_timestamp": ["2026-11-01T00:00:00Z"]}
    source = {"push_source_name": "docs", "df": frame}
    written = {"feature_view_name": "doc", "df": frame}
    return {
        "a push": push(connection, -1),
        "a push that is known": push(connection, 2, "known"),
        "a push of Feast's": connection.ask("POST", "/push", source, **AS_JSON),
        "rows of Feast's": connection.ask("POST", "/write-to-online-store", written, **AS_JSON),
        "a reload": connection.ask("POST", "/v1/reload", {"view": "doc"}),
        "readiness": connection.ask("GET", "/ready"),
    }


def test_nothing_is_acknowledged_while_other_files_lie_at_the_path_of_the_store(store: Path, root: ExportRoot) -> None:
    with serving(store, root) as (server, connection):
        eventually(lambda: is_ready(connection), "a server that is ready")
        value = 2
        assert push(connection, value, "known").status == 200
        assert connection.ask("GET", "/v1/status").json["trouble"] is None
        for how, away in [*AWAY.items(), ("the store deleted", delete)]:
            back = away(store)
            refused = refusals(connection)
            assert {name: answer.status for name, answer in refused.items() if answer.status != 503} == {}, how
            assert refused["a push"].error[0] == refused["readiness"].error[0] == "StoreMoved", how
            assert seen(connection) == [value], how
            assert connection.ask("GET", "/v1/status").json["trouble"]["code"] == "StoreMoved", how
            if how in ("live moved", "data.mdb replaced"):
                told = subprocess.run([sys.executable, "-m", "shoal", "status", "--store", store], capture_output=True)
                assert told.returncode == 1
                assert b"was moved, deleted or replaced while it was open" in told.stdout + told.stderr, told
            if back is not None:
                # Once the files are back, everything works again.
                back()
                value += 1
                assert is_ready(connection), how
                assert push(connection, value).status == 200, how
                assert seen(connection) == [value], how
        eventually(lambda: "doc: StoreMoved: " in server.log, "the writer's complaint, as it follows the root")
        assert "Traceback" not in server.log
    # The server created nothing at the store's old path.
    assert not store.exists() or not {"live", "begun", "generations"} & set(os.listdir(store))


def test_a_restart_without_live_says_so_and_serves_again_once_it_is_back(store: Path, root: ExportRoot) -> None:
    with serving(store, root) as (_, connection):
        eventually(lambda: is_ready(connection), "a server that is ready")
        assert push(connection, 2).status == 200
        (store / "live").rename(store / "elsewhere")
    with serving(store, root) as (server, connection):
        eventually(lambda: "writer cannot go on: StoreDamaged: " in server.log, "the writer's complaint")
        for answer in (connection.ask("GET", "/ready"), push(connection, 3)):
            assert (answer.status, answer.error[0]) == (503, "StoreDamaged")
        assert connection.ask("GET", "/v1/status").json["trouble"]["code"] == "StoreDamaged"
        (store / "elsewhere").rename(store / "live")
        eventually(lambda: is_ready(connection), "a store that is whole")
        assert seen(connection) == [2]
