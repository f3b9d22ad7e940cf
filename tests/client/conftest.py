"""A root, a server of all its rows, and three servers with one shard each. A test file starts only those it needs."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from shoal.engine.base.shards import Shard
from shoal.engine.format.schema import FeatureService
from shoal.engine.root.export_root import ExportRoot
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.follow.load import load
from tests import stores
from tests.every_type import ITEMS, PAIRS, USERS, item_rows, pair_rows, user_rows
from tests.server.serving import Server

SHARDS = 3
SERVICE = FeatureService(name="ranking", features=("items:single", "users:*", "pairs:times", "items:vector"))
PATIENT: dict[str, Any] = {"timeout": 30.0, "connect_timeout": 5.0}
"""Timeouts in seconds that are long enough for a single request on a busy machine."""


@dataclass(frozen=True)
class Published:
    """A root with many rows, and a directory for stores."""

    root: ExportRoot
    directory: Path

    def server(self, name: str, shard: Shard | None = None, **settings: Any) -> Server:
        """Load a store from the root, start a server of it, and return the server. Entering it waits for its first
        answer."""
        with StoreWriter(self.directory / name, shard=shard) as writer:
            load(writer, self.root, stores.NullObserver())
        return Server(self.directory / name, {"root": str(self.root)}, workers=1, **settings)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    directory = tmp_path_factory.mktemp("published")
    root = ExportRoot(directory / "root")
    stores.publish_snapshot(root, ITEMS, item_rows(300))
    stores.publish_delta(root, ITEMS, [{"items_id": "item-3", "single": 77.0}], [{"items_id": "item-5"}])
    stores.publish_snapshot(root, USERS, user_rows(200))
    stores.publish_snapshot(root, PAIRS, pair_rows())
    root.publish_services((SERVICE,))
    return Published(root, directory)


@pytest.fixture(scope="module")
def whole(published: Published) -> Iterator[Server]:
    """A server of all rows."""
    with published.server("whole") as server:
        server.await_ready()
        yield server


@pytest.fixture(scope="module")
def shards(published: Published) -> Iterator[list[Server]]:
    """One server per shard."""
    numbers = range(1, SHARDS + 1)
    starting = [published.server(f"shard-{number}", Shard(number, SHARDS)) for number in numbers]
    with ExitStack() as opened:
        servers = [opened.enter_context(server) for server in starting]
        for server in servers:
            server.await_ready()
        yield servers


def addresses(servers: list[Server]) -> list[str]:
    return [server.record.address for server in servers]
