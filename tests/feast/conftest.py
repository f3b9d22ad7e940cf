"""A real Feast server and a real Shoal server, loaded with the same rows."""

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from shoal.engine.root.export_root import ExportRoot
from tests import stores
from tests.feast import compared
from tests.server.serving import Connection, Server, eventually

HERE = Path(__file__).parent


@dataclass(frozen=True)
class FeastEnvironment:
    """An environment with Feast and without Shoal."""

    bin: Path

    def run(self, script: str, *arguments: object, text: str = "") -> str:
        """Run a script of this directory with the environment's interpreter, and return its output."""
        command = [str(self.bin / "python"), str(HERE / script), *map(str, arguments)]
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="session")
def feast_environment() -> FeastEnvironment:
    path = Path(os.environ.get("SHOAL_FEAST_BIN", HERE.parents[1] / ".venv-peers" / "bin"))
    if not (path / "feast").exists():
        pytest.skip(f"{path} has no feast: `make .venv-peers/installed` makes it, SHOAL_FEAST_BIN names another place")
    return FeastEnvironment(path)


@pytest.fixture(scope="session")
def rows() -> dict[str, list[stores.Row]]:
    return compared.rows()


@pytest.fixture(scope="session")
def feast_repo(
    feast_environment: FeastEnvironment, rows: dict[str, list[stores.Row]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    directory = tmp_path_factory.mktemp("feast")
    compared.write_data(directory / "data", rows)
    feast_environment.run("feast_repo.py", directory / "repo", directory / "data")
    return directory / "repo"


@pytest.fixture(scope="session")
def feast(feast_environment: FeastEnvironment, feast_repo: Path) -> Iterator[str]:
    """The address of `feast serve`."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    # By default, the server restarts after a thousand requests.
    command = [feast_environment.bin / "feast", "-c", feast_repo, "serve", "-p", str(port), "--max-requests", "1000000"]
    log_path = feast_repo.parent / "feast.log"
    with log_path.open("w") as log:
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, start_new_session=True)

    def answers() -> bool:
        assert process.poll() is None, log_path.read_text()
        try:
            return Connection(address).ask("GET", "/health").status == 200
        except ConnectionError:
            return False

    try:
        eventually(answers, "Feast's server")
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


@pytest.fixture(scope="session")
def shoal_root(rows: dict[str, list[stores.Row]], tmp_path_factory: pytest.TempPathFactory) -> ExportRoot:
    root = ExportRoot(tmp_path_factory.mktemp("shoal") / "root")
    for view in compared.VIEWS:
        stores.publish_snapshot(root, view, rows[view.name])
    root.publish_services(compared.SERVICES)
    return root


@pytest.fixture(scope="session")
def strict_server(shoal_root: ExportRoot) -> Iterator[Server]:
    yield from served(shoal_root, "strict", feast_strict=True)


@pytest.fixture(scope="session")
def default_server(shoal_root: ExportRoot) -> Iterator[Server]:
    yield from served(shoal_root, "default")


def served(root: ExportRoot, name: str, **settings: Any) -> Iterator[Server]:
    store = Path(str(root)).parent / name
    stores.load(store, root)
    with Server(store, workers=1, **settings) as server:
        server.await_ready()
        yield server
