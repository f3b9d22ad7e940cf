"""Idle connections, far more than a server may have open, are closed and never block other clients."""

import select
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from shoal.engine.root.export_root import ExportRoot
from tests import stores
from tests.server.conftest import GRPC_PORT
from tests.server.serving import Server, eventually

DOC = stores.schema("doc", key="int64", a="int64")
ASKED = {"features": ["doc:a"], "entities": {"doc_id": [1]}}
REQUEST = b"GET /health HTTP/1.1\r\nHost: shoal\r\n\r\n"
OPEN_FILES, FITTING, IDLE = 256, 64, 300
"""Half of the open files are for connections, less 64 for extra connections. Two ports share the rest equally."""
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""The bytes that every HTTP/2 client sends first: the preface and a SETTINGS frame, which is empty here."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("idle")
    root = ExportRoot(directory / "root")
    stores.publish_snapshot(root, DOC, [{"doc_id": 1, "a": 2}])
    stores.load(directory / "store", root)
    limits: dict[str, Any] = {"patience_seconds": 8.0, "idle_seconds": 2.0, "grpc_port": GRPC_PORT}
    environment = {"OPEN_FILES": str(OPEN_FILES)}
    with Server(directory / "store", workers=1, environment=environment, **limits) as server:
        server.await_ready()
        yield server


def is_ended(connection: socket.socket) -> bool:
    """Return whether the server has closed a connection with nothing left to read."""
    readable, _, _ = select.select([connection], [], [], 0)
    try:
        return bool(readable) and not connection.recv(1 << 16)
    except ConnectionResetError:
        return True


def test_connections_are_fitted_to_the_files_that_may_be_open(server: Server) -> None:
    each = FITTING // (1 if GRPC_PORT is None else 2)
    assert f"the limit is {OPEN_FILES}: each worker keeps {each} connections" in server.log


def test_idle_connections_lock_nobody_out_and_are_ended(server: Server) -> None:
    # The connections are silent from the start, after half a request head, or after an answer.
    idle = [server.raw_socket() for _ in range(IDLE)]
    for number, connection in enumerate(idle):
        if number % 3:
            connection.sendall(REQUEST if number % 3 == 1 else REQUEST[:10])
    try:
        for _ in range(3):
            for path in ("/health", "/ready", "/metrics"):
                assert server.ask("GET", path).status == 200
        eventually(lambda: server.ask("POST", "/v1/lookup", ASKED).status == 200, "a place for a client that asks")
        for connection in idle:
            eventually(lambda: is_ended(connection), "the end of an idle connection")  # noqa: B023
    finally:
        for connection in idle:
            connection.close()
    assert b'shoal_requests_shed_total{reason="idle"}' in server.ask("GET", "/metrics").body
    with server.connection() as asking:
        for _ in range(20):
            assert asking.ask("POST", "/v1/lookup", ASKED).status == 200


def test_idle_connections_over_grpc_lock_nobody_out_and_are_ended(server: Server) -> None:
    grpc = pytest.importorskip("grpc")
    host, _, port = server.grpc_address.rpartition(":")
    idle = [socket.create_connection((host, int(port))) for _ in range(IDLE)]
    for connection in idle[::2]:
        connection.sendall(PREFACE)
    try:
        for connection in idle:
            eventually(lambda: is_ended(connection), "the end of an idle connection")  # noqa: B023
        with grpc.insecure_channel(server.grpc_address) as channel:
            check = channel.unary_unary("/grpc.health.v1.Health/Check")
            eventually(lambda: check(b"", wait_for_ready=True, timeout=60), "an answer over gRPC")
        assert server.ask("GET", "/health").status == 200
    finally:
        for connection in idle:
            connection.close()
