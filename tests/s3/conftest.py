"""One S3 for the tests of a file, a prefix of its bucket for each of them, and a network before it that can fail."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.export_root import ExportRoot
from tests.faulty_network import FaultyNetwork, faulty_network
from tests.s3 import server


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server keeps its objects, as plain files: `objects/BUCKET/KEY`."""
    return tmp_path_factory.mktemp("s3")


@pytest.fixture(scope="module")
def endpoint(disk: Path) -> Iterator[str]:
    """The URL of a server, which is the environment's, too."""
    program = server.versitygw()
    if program is None:
        pytest.skip("there is no S3 server; `make .s3-server/versitygw` builds one")
    with pytest.MonkeyPatch.context() as environment:
        for name, value in server.ACCESS.items():
            environment.setenv(name, value)
        with server.running(disk, program) as url:
            environment.setenv("AWS_ENDPOINT_URL", url)
            yield url


@pytest.fixture
def address(endpoint: str) -> str:
    """An export root that nobody else uses."""
    return f"s3://{server.BUCKET}/roots/{uuid.uuid4().hex}"


@pytest.fixture
def remote(address: str) -> ExportRoot:
    return ExportRoot(address)


@pytest.fixture
def network(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyNetwork]:
    """What lies between clients that are made from now on and the server."""
    with faulty_network(endpoint) as network:
        monkeypatch.setenv("AWS_ENDPOINT_URL", network.url)
        yield network
