"""One server with two workers and a writer that follows an export root, shared by all tests that only send requests."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.engine.format.schema import FeatureService
from shoal.engine.root.export_root import ExportRoot
from tests import stores
from tests.every_type import ITEMS, PAIRS, RECENT, SERVICE, USERS, item_rows, pair_rows, recent_rows, user_rows
from tests.server.serving import Server

# 0 stands for any free port. Without gRPC there is no port.
GRPC_PORT = 0 if importlib.util.find_spec("grpc") else None

NUMBERS = FeatureService(name="numbers", features=("items:vector", "recent:*", "items:single"))


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> ExportRoot:
    root = ExportRoot(tmp_path_factory.mktemp("endpoints") / "root")
    stores.publish_snapshot(root, ITEMS, item_rows(20))
    stores.publish_snapshot(root, USERS, user_rows(10))
    stores.publish_snapshot(root, PAIRS, pair_rows())
    stores.publish_snapshot(root, RECENT, recent_rows())
    root.publish_services((SERVICE, NUMBERS))
    return root


@pytest.fixture(scope="session")
def server(root: ExportRoot) -> Iterator[Server]:
    store = Path(str(root)).parent / "store"
    with Server(store, {"root": str(root)}, max_body_bytes=20_000, max_keys=50, grpc_port=GRPC_PORT) as server:
        server.await_views("items", "users", "pairs", "recent")
        yield server
