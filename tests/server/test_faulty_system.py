"""A clock that jumps, and a root that hangs or fails. A preloaded library changes the results of the server's C library
calls."""

import mmap
import shutil
import struct
import subprocess
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from shoal.engine.root.export_root import ExportRoot
from tests import stores
from tests.server.serving import Server, eventually

DOC = stores.schema("doc", key="int64", a="int64")
OTHER = stores.schema("other", key="int64", a="int64")
YEAR = 365 * 24 * 3600
FINE, HANGS, FAILS = 0, 1, 2


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler; install gcc")
    path = tmp_path_factory.mktemp("library") / "faulty_system.so"
    source = Path(__file__).with_name("faulty_system.c")
    # Fortified headers would define some of these functions with others.
    options = ["-shared", "-fPIC", "-O1", "-U_FORTIFY_SOURCE"]
    subprocess.run([compiler, *options, "-o", str(path), str(source), "-ldl"], check=True)
    return path


class System:
    """The faults of the system for all processes that run with `environment`."""

    def __init__(self, directory: Path, library: Path, root: ExportRoot) -> None:
        path = directory / "control"
        path.write_bytes(bytes(16))
        with path.open("r+b") as file:
            self._control = mmap.mmap(file.fileno(), 16)
        self.environment: Mapping[str, str] = {
            "LD_PRELOAD": str(library),
            "FAULTY_CONTROL": str(path),
            "FAULTY_ROOT": str(root.path),
        }

    def set_clock(self, ahead: int) -> None:
        """Set the clock ahead by a number of seconds."""
        struct.pack_into("=q", self._control, 0, ahead)

    def set_root(self, state: int) -> None:
        struct.pack_into("=q", self._control, 8, state)


@pytest.fixture
def root(tmp_path: Path) -> ExportRoot:
    root = ExportRoot(tmp_path / "root")
    for view in (DOC, OTHER):
        stores.publish_snapshot(root, view, [{f"{view.name}_id": number, "a": number} for number in range(10)])
    return root


@pytest.fixture
def system(tmp_path: Path, library: Path, root: ExportRoot) -> System:
    return System(tmp_path, library, root)


def seen(server: Server, key: int, view: str = "doc") -> Any:
    answer = server.lookup([f"{view}:a"], {f"{view}_id": [key]})
    assert answer.status == 200, answer.body
    return answer.json["features"][f"{view}:a"][0]


def is_seen(server: Server, value: int) -> bool:
    return bool(seen(server, 1, "other") == value)


def await_watched(server: Server, root: ExportRoot) -> None:
    """Wait until the writer has read the whole root and watches it."""
    for value in (100, 101):
        stores.publish_delta(root, OTHER, [{"other_id": 1, "a": value}])
        eventually(partial(is_seen, server, value), "the delta")


def push(server: Server, view: str, key: int, value: int, **columns: Any) -> dict[str, Any]:
    rows = {f"{view}_id": [key], "a": [value]} | {name: [content] for name, content in columns.items()}
    answer = server.ask("POST", "/v1/push", {"view": view, "rows": rows})
    assert answer.status == 200, answer.body
    document: dict[str, Any] = answer.json
    return document


def troubles(server: Server) -> dict[str, str]:
    views = server.ask("GET", "/v1/status").json["views"]
    return {view["name"]: view["trouble"]["code"] for view in views if view["trouble"]}


def test_a_clock_that_jumps_loses_nothing_and_ends_nobody(store: Path, root: ExportRoot, system: System) -> None:
    with Server(store, {"root": str(root)}, environment=system.environment) as server:
        server.await_views("doc", "other")
        before = server.record
        for number, ahead in enumerate((0, YEAR, -YEAR, 3600, 0)):
            system.set_clock(ahead)
            # Key 100 is pushed with the client's event time, the other keys with the server's time.
            push(server, "doc", 100, number, event_timestamp=f"2020-01-0{number + 1}T00:00:00Z")
            assert seen(server, 100) == number
            assert push(server, "doc", 200 + number, number)["superseded"] == 0
            assert [seen(server, 200 + earlier) for earlier in range(number + 1)] == list(range(number + 1))
            stores.publish_delta(root, OTHER, [{"other_id": 1, "a": 1000 + number}])
            eventually(partial(is_seen, server, 1000 + number), "the delta")
            # A row that is older by the server's clock is not applied, and is counted as superseded.
            assert push(server, "doc", 1, number)["superseded"] in (0, 1)
        assert push(server, "doc", 201, 7)["superseded"] == 1
        assert seen(server, 201) == 1
        assert troubles(server) == {}
        assert server.record == before, server.log


def test_a_root_that_does_not_answer_holds_up_nothing_but_its_deltas(
    store: Path, root: ExportRoot, system: System
) -> None:
    with Server(store, {"root": str(root)}, environment=system.environment) as server:
        server.await_views("doc", "other")
        await_watched(server, root)
        before = server.record
        system.set_root(HANGS)
        stores.publish_delta(root, OTHER, [{"other_id": 1, "a": 7}])
        stores.publish_delta(root, DOC, [{"doc_id": 1, "a": 7}])
        eventually(lambda: troubles(server) == {"doc": "RootSilent", "other": "RootSilent"}, "that it is told")
        for number in range(5):
            for view in ("doc", "other"):
                push(server, view, 100, number)
                assert seen(server, 100, view) == number
        assert seen(server, 1) == 1
        assert server.ask("GET", "/ready").status == 200
        system.set_root(FINE)
        eventually(lambda: seen(server, 1) == seen(server, 1, "other") == 7, "the deltas")
        eventually(lambda: troubles(server) == {}, "that the trouble is over")
        assert server.record == before, server.log


def test_a_server_ends_though_its_root_does_not_answer(store: Path, root: ExportRoot, system: System) -> None:
    with Server(store, {"root": str(root)}, environment=system.environment) as server:
        server.await_views("doc", "other")
        await_watched(server, root)
        system.set_root(HANGS)
        stores.publish_delta(root, OTHER, [{"other_id": 1, "a": 7}])
        server.process.terminate()
        assert server.process.wait(60) == 0


def test_a_root_that_fails_is_told_and_read_again_when_it_is_well(
    store: Path, root: ExportRoot, system: System
) -> None:
    with Server(store, {"root": str(root)}, environment=system.environment) as server:
        server.await_views("doc", "other")
        system.set_root(FAILS)
        stores.publish_delta(root, DOC, [{"doc_id": 1, "a": 7}])
        eventually(lambda: troubles(server) == {"doc": "RootUnreadable", "other": "RootUnreadable"}, "that it is told")
        assert (seen(server, 1), push(server, "doc", 100, 1)["rows"]) == (1, 1)
        system.set_root(FINE)
        eventually(lambda: seen(server, 1) == 7, "the delta")
        eventually(lambda: troubles(server) == {}, "that the trouble is over")
