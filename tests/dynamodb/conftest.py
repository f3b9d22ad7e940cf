"""One server of DynamoDB's interface per test file, and a network in front of it that can fail."""

import uuid
from collections.abc import Iterator

import pytest

from tests.dynamodb import server
from tests.dynamodb.tables import ENDPOINT
from tests.faulty_network import FaultyNetwork, faulty_network


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server, which is also set in the environment."""
    command = server.dynalite()
    if command is None:
        pytest.skip("there is no server of DynamoDB's interface; `make .dynamodb-server/installed` installs one")
    with pytest.MonkeyPatch.context() as environment:
        for name, value in server.ACCESS.items():
            environment.setenv(name, value)
        with server.running(command, tmp_path_factory.mktemp("dynamodb") / "log") as url:
            environment.setenv(ENDPOINT, url)
            yield url


@pytest.fixture
def table(endpoint: str) -> str:
    """The name of a table that no other test uses."""
    return f"test-{uuid.uuid4().hex}"


@pytest.fixture
def network(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyNetwork]:
    """A network that can fail, between the server and the clients that are created from now on."""
    with faulty_network(endpoint) as network:
        monkeypatch.setenv(ENDPOINT, network.url)
        yield network
