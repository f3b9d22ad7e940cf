"""gRPC workers on one shared port, when they start, end and are replaced."""

import os
import signal
import socket
import threading
from pathlib import Path

import psutil
import pytest

from shoal.engine.root.export_root import ExportRoot
from tests.server.serving import PATIENCE_SECONDS, Server, eventually

grpc = pytest.importorskip("grpc", reason="grpcio is not installed: pip install 'shoal[grpc]'")

from tests.server.grpc_client import SERVING, Client, as_sent, asked, client_of, integers, texts  # noqa: E402

USER = {"users_id": integers(3)}
ITEMS = {"items_id": texts("nulls", "extremes", "empties", "none", *(f"item-{number}" for number in range(20)))}


def workers_on(server: Server) -> set[int]:
    """Return the process ids of the workers with gRPC clients."""
    port = int(server.grpc_address.rpartition(":")[2])
    return {
        pid
        for pid in server.record.workers
        for connection in psutil.Process(pid).net_connections("tcp")
        if connection.status == psutil.CONN_ESTABLISHED and connection.laddr.port == port
    }


def test_all_workers_answer(server: Server) -> None:
    clients = [Client(server.grpc_address) for _ in range(24)]
    for client in clients:
        assert client.ask(asked(["users:score"], USER))["results"]
    assert workers_on(server) == set(server.record.workers)
    for client in clients:
        client.channel.close()


def test_a_worker_that_replaces_another_answers_too(root: ExportRoot, tmp_path: Path) -> None:
    with Server(tmp_path / "store", {"root": str(root)}, workers=1, grpc_port=0) as server:
        server.await_views("users")
        first = server.record.workers
        os.kill(first[0], signal.SIGKILL)
        eventually(lambda: server.record.workers not in ((), first), "another worker")
        with client_of(server) as client:
            assert client.ask(asked(["users:score"], USER))["results"]


def test_without_a_store_there_is_an_error_and_no_health(tmp_path: Path) -> None:
    with Server(tmp_path / "store", grpc_port=0) as server, client_of(server) as client:
        code, message = client.refusal(as_sent(asked(["users:score"], USER)))
        assert code == "UNAVAILABLE"
        assert "store" in message
        assert client.health() == "NOT_SERVING"


def test_a_server_that_drains_answers_or_says_that_it_is_gone(root: ExportRoot, tmp_path: Path) -> None:
    with Server(tmp_path / "store", {"root": str(root)}, grpc_port=0) as server:
        server.await_views("items")
        clients = [Client(server.grpc_address) for _ in range(4)]
        request = as_sent(asked(["items:*"], ITEMS))
        outcomes: list[str] = []

        def keep_asking(client: Client) -> None:
            while True:
                try:
                    client.channel.unary_unary(f"/{SERVING}/GetOnlineFeatures")(request, timeout=PATIENCE_SECONDS)
                except grpc.RpcError as error:
                    outcomes.append(error.code().name)
                    return

        threads = [threading.Thread(target=keep_asking, args=(client,)) for client in clients]
        for thread in threads:
            thread.start()
        eventually(lambda: workers_on(server), "connections")
        server.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(PATIENCE_SECONDS)
        assert server.process.wait(PATIENCE_SECONDS) == 0
        # gRPC cancels a request that arrives while the server closes: the request is accepted, but no handler receives
        # it.
        assert len(outcomes) == 4
        assert {"UNAVAILABLE", "CANCELLED"}.issuperset(outcomes)
        assert "did not stop" not in server.log


@pytest.mark.parametrize("reuse", [False, True])
def test_a_port_that_is_taken_is_one_error_at_the_start(tmp_path: Path, reuse: bool) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(reuse))
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = Server(tmp_path / "store", grpc_port=taken.getsockname()[1])
        assert server.process.wait(PATIENCE_SECONDS) == 1
    assert "AddressUnusable: cannot listen for gRPC on 127.0.0.1" in server.log
    assert "started, pid" not in server.log


def test_two_servers_do_not_share_a_port(tmp_path: Path) -> None:
    with Server(tmp_path / "one", grpc_port=0) as one:
        two = Server(tmp_path / "two", grpc_port=int(one.grpc_address.rpartition(":")[2]))
        assert two.process.wait(PATIENCE_SECONDS) == 1
        assert "AddressUnusable" in two.log
