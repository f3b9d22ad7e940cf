"""Large answers: encoding one delays no other client, and the size of unread answers is bounded."""

import contextlib
import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from shoal.engine.root.export_root import ExportRoot
from tests import stores
from tests.server.conftest import GRPC_PORT
from tests.server.serving import Connection, Server, eventually

MIB = 1 << 20
ROWS, ITEMS = 50, 4096
DOC = stores.schema("doc", key="int64", vector=f"float32[{ITEMS}]", text="string")


def repeated(count: int) -> list[int]:
    """Return `count` keys with many repetitions, so that a small store gives large answers."""
    return [number % ROWS for number in range(count)]


VECTORS = {"features": ["doc:vector"], "entities": {"doc_id": repeated(1000)}}
VECTOR_MIB = 1000 * ITEMS * 4 // MIB
ANSWER_MIB, UNSENT_MIB = 48, 64
TEXT = "\x01" * 9000
"""A text with characters that take six bytes each in JSON."""
NPY = "application/x-npy"
STOPPING = """
import os, signal, sys, time
import grpc
from tests.server.grpc_client import as_sent, asked, integers
address, calls, rows = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
request = as_sent(asked(["doc:vector"], {"doc_id": integers(*[number % rows for number in range(1000)])}))
options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
channels = [grpc.insecure_channel(address, options=options) for _ in range(calls)]
for channel in channels:
    grpc.channel_ready_future(channel).result(90)
asked = [channel.unary_unary("/GrpcFeatureServer/GetOnlineFeatures").future(request) for channel in channels]
time.sleep(0.01)
os.kill(os.getpid(), signal.SIGSTOP)
"""
"""A client that sends requests over many connections and then stops, so that nobody reads the answers."""
ARROW = "application/vnd.apache.arrow.stream"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("unread")
    root = ExportRoot(directory / "root")
    vector = [0.123456789] * ITEMS
    rows = [{"doc_id": number, "vector": vector, "text": TEXT} for number in range(ROWS)]
    stores.publish_snapshot(root, DOC, rows)
    stores.load(directory / "store", root)
    limits: dict[str, Any] = {
        "max_answer_bytes": ANSWER_MIB * MIB,
        "max_unsent_bytes": UNSENT_MIB * MIB,
        "patience_seconds": 3.0,
        "grpc_port": GRPC_PORT,
    }
    with Server(directory / "store", workers=1, **limits) as server:
        server.await_ready()
        yield server


def asking(server: Server, body: Any, accept: str = "application/json") -> socket.socket:
    """Send a lookup and return its connection, without reading the answer."""
    connection = server.raw_socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    content = json.dumps(body).encode()
    head = f"POST /v1/lookup HTTP/1.1\r\nHost: shoal\r\nAccept: {accept}\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


def keys_looked_up(connection: Connection) -> float:
    found = re.search(rb"^shoal_lookup_keys_total (\S+)", connection.ask("GET", "/metrics").body, re.MULTILINE)
    return float(found[1]) if found else 0.0


def answered(connection: socket.socket) -> bytes:
    """Return the beginning of an answer and leave it unread, or return nothing if there is no answer yet."""
    connection.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        return connection.recv(12, socket.MSG_PEEK)
    return b""


@pytest.mark.parametrize("features", [["doc:vector"], ["doc:text"]], ids=["kernels", "python"])
def test_others_are_answered_while_a_large_answer_is_encoded(server: Server, features: list[str]) -> None:
    asked = {"features": features, "entities": {"doc_id": repeated(900)}}

    def others_came_between() -> bool:
        before = keys_looked_up(other)
        with contextlib.closing(asking(server, asked)) as large:
            eventually(lambda: keys_looked_up(other) > before or answered(large), "the lookup")
            return not answered(large)

    with server.connection() as other:
        eventually(others_came_between, "an answer to somebody else between a large lookup and its answer")


@pytest.mark.parametrize("accept", ["application/json", ARROW, NPY])
def test_an_answer_over_the_limit_of_bytes_is_refused_by_name(server: Server, accept: str) -> None:
    body = {"features": ["doc:vector"], "entities": {"doc_id": repeated(4000)}}
    answer = server.ask("POST", "/v1/lookup", body, Accept=accept)
    assert (answer.status, answer.error[0]) == (413, "RequestTooLarge")
    assert f"{ANSWER_MIB * MIB}" in answer.error[1]
    assert "max_answer_bytes" in answer.error[1]


def test_an_answer_that_grows_over_the_limit_as_it_is_written_is_refused(server: Server) -> None:
    texts = {"features": ["doc:text"], "entities": {"doc_id": repeated(1000)}}
    assert server.ask("POST", "/v1/lookup", texts, Accept=ARROW).status == 200
    answer = server.ask("POST", "/v1/lookup", texts)
    assert (answer.status, answer.error[0]) == (413, "RequestTooLarge")
    assert "max_answer_bytes" in answer.error[1]
    answer = server.ask("POST", "/get-online-features", texts)
    assert answer.status == 413
    assert b"max_answer_bytes" in answer.body


def test_answers_that_nobody_reads_are_bounded_and_end(server: Server) -> None:
    worker = psutil.Process(server.record.workers[0])
    # A client that reads its answers is never refused.
    for _ in range(2 * UNSENT_MIB // VECTOR_MIB):
        assert server.ask("POST", "/v1/lookup", VECTORS, Accept=NPY).status == 200
    before = worker.memory_info().rss
    unread: list[socket.socket] = []
    try:
        while not unread or eventually(lambda: answered(unread[-1]), "an answer").endswith(b"200"):
            unread.append(asking(server, VECTORS, NPY))
            assert len(unread) < 40
        refusal = unread[-1].recv(1 << 16)
        assert b" 503 " in refusal
        assert b"max_unsent_bytes" in refusal
        assert server.ask("GET", "/health").status == 200
        assert worker.memory_info().rss - before < 4 * UNSENT_MIB * MIB
        assert b'shoal_requests_shed_total{reason="unsent"}' in server.ask("GET", "/metrics").body
        # Clients that do not read are disconnected, so other clients are served again.
        eventually(lambda: server.ask("POST", "/v1/lookup", VECTORS, Accept=NPY).status == 200, "room for answers")
    finally:
        for connection in unread:
            connection.close()


def test_answers_over_grpc_that_nobody_reads_are_bounded_and_end(server: Server) -> None:
    pytest.importorskip("grpc")
    command = [sys.executable, "-c", STOPPING, server.grpc_address, "20", str(ROWS)]

    def status() -> int:
        return server.ask("POST", "/v1/lookup", VECTORS, Accept=NPY).status

    def is_refused_while_they_stand_still() -> bool:
        with subprocess.Popen(command) as asking:
            try:
                eventually(lambda: psutil.Process(asking.pid).status() == psutil.STATUS_STOPPED, "a client that stops")
                # Answers are encoded in order, so these come after the clients' answers.
                refused = status() == 503 or status() == 503
                assert server.ask("GET", "/health").status == 200
                if refused:
                    eventually(lambda: status() == 200, "room for answers")
                return refused
            finally:
                asking.kill()

    # A client may stop before it has sent all of its requests.
    eventually(is_refused_while_they_stand_still, "a refusal while clients of gRPC do not read")


def test_large_answers_over_grpc_are_counted_until_they_are_taken(server: Server) -> None:
    pytest.importorskip("grpc")
    from tests.server.grpc_client import as_sent, asked, client_of, integers

    with client_of(server) as client:
        code, message = client.refusal(as_sent(asked(["doc:vector"], {"doc_id": integers(*repeated(4000))})))
        assert code == "RESOURCE_EXHAUSTED"
        assert "max_answer_bytes" in message
        for _ in range(2 * UNSENT_MIB):
            request = as_sent(asked(["doc:vector"], {"doc_id": integers(*repeated(200))}))
            assert len(client.call(request)[0]) > 200 * ITEMS * 4
