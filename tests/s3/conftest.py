"""Fixtures for S3: one server per test file, one prefix of its bucket per test, and a network that can fail."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.engine.root.export_root import ExportRoot
from tests.faulty_network import FaultyNetwork, faulty_network
from tests.s3 import server


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory where the server stores its objects as plain files: `objects/BUCKET/KEY`."""
    return tmp_path_factory.mktemp("s3")


@pytest.fixture(scope="module")
def endpoint(disk: Path) -> Iterator[str]:
    """The URL of an S3 server, which is also set in the environment."""
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
    """The address of an unused export root."""
    return f"s3://{server.BUCKET}/roots/{uuid.uuid4().hex}"


@pytest.fixture
def remote(address: str) -> ExportRoot:
    return ExportRoot(address)


@pytest.fixture
def network(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyNetwork]:
    """The network between the server and all clients that are created from now on."""
    with faulty_network(endpoint) as network:
        monkeypatch.setenv("AWS_ENDPOINT_URL", network.url)
        yield network
