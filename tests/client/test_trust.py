"""A server may send any bytes at any pace: a call ends by its deadline, with an answer or an error of the client."""

import asyncio
import io
import random
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pytest

from shoal.client import Client, DeadlineExceeded, NoAnswer, ShoalError
from shoal.client.aio import AsyncClient
from shoal.client.errors import AnswerInvalid
from shoal.client.reading import read_answer, read_document, read_pushed
from shoal.client.schema import Schema
from shoal.client.wire import Response
from shoal.loaders.apply.definition import BEFORE_THE_LOG

FEATURES = ["users:score", "users:text"]
KEYS = {"users_id": [1, 2]}
SCHEMA: dict[str, Any] = {
    "views": [
        {
            "name": "users",
            "join_keys": [{"name": "users_id", "type": "int64"}],
            "features": [{"name": "score", "type": "float32"}, {"name": "text", "type": "string"}],
            "timestamp_field": None,
        }
    ],
    "services": [{"name": "all", "features": ["users:*"]}],
}
DOCUMENT = {
    "features": {"users:score": [1.0, None], "users:text": ["a", None]},
    "status": {"users": ["PRESENT", "NOT_FOUND"]},
    "event_timestamps": {"users": ["2026-01-01T00:00:00Z", None]},
}
PUSHED = {"rows": 2, "superseded": 0, "version": 7}


def stream(columns: dict[str, Any], batches: int = 1) -> bytes:
    batch = pa.RecordBatch.from_pydict(columns)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        for _ in range(batches):
            writer.write_batch(batch)
    return bytes(sink.getvalue())


def npy(matrix: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, matrix)
    return file.getvalue()


SCORE = pa.array([1.0, None], pa.float32())
GOOD: dict[str, bytes] = {
    "arrow": stream({"users:score": SCORE, "users:text": ["a", None]}),
    "npy": npy(np.ones((2, 2), np.float32)),
    "json": orjson.dumps(DOCUMENT),
}


def http(body: bytes, status: int = 200, head: str = "X-Shoal-Version: 7\r\n") -> bytes:
    return f"HTTP/1.1 {status} S\r\nContent-Length: {len(body)}\r\nConnection: close\r\n{head}\r\n".encode() + body


class Liar(socketserver.ThreadingTCPServer):
    """A server that gives the same bytes as every answer, and sends the slice `trickling` of them one by one."""

    daemon_threads = True
    answer = b""
    trickling = slice(0, 0)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        length = 0
        while (line := self.rfile.readline()) not in (b"\r\n", b""):
            if line.lower().startswith(b"content-length:"):
                length = int(line.partition(b":")[2])
        self.rfile.read(length)
        assert isinstance(self.server, Liar)
        answer = self.server.answer
        slow = self.server.trickling
        try:
            self.wfile.write(answer[: slow.start])
            for byte in answer[slow]:
                self.wfile.write(bytes([byte]))
                time.sleep(0.02)
            self.wfile.write(answer[slow.stop :])
        except OSError:
            pass  # The client has closed the connection.


@pytest.fixture(scope="module")
def liar() -> Iterator[Liar]:
    with Liar(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(url: Any, do: Any, **settings: Any) -> Iterator[Any]:
    """Yield the result or error of an operation, from the blocking and then from the asynchronous client."""

    async def ask_asynchronously() -> Any:
        async with AsyncClient(url, **settings) as client:
            return await do(client)

    def ask_in_thread() -> Any:
        with Client(url, **settings) as client:
            return do(client)

    for run in (ask_in_thread, lambda: asyncio.run(ask_asynchronously())):
        try:
            yield run()
        except ShoalError as error:
            yield error


def lookup(form: str) -> Any:
    return lambda client: client.lookup(FEATURES, KEYS, format=form)


CHUNKS = b"HTTP/1.1 200 OK\r\nX-Shoal-Version: 7\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
SLOW = "a" * 250


@pytest.mark.parametrize(
    ("answer", "begin"),
    [
        (http(GOOD["json"]), b"HTTP"),
        (http(GOOD["json"], head=f"X-Shoal-Version: 7\r\nX-Slow: {SLOW}\r\n"), b"a" * 250),
        (CHUNKS + b"%x;%s\r\n%s\r\n0\r\n\r\n" % (len(GOOD["json"]), SLOW.encode(), GOOD["json"]), b"a" * 250),
        (CHUNKS + b"%x\r\n%s\r\n0\r\nX: %s\r\n\r\n" % (len(GOOD["json"]), GOOD["json"], SLOW.encode()), b"a" * 250),
        (http(GOOD["json"] + b" " * 250), b" " * 250),
    ],
    ids=["status line", "head", "chunk size", "trailer", "body"],
)
def test_a_call_ends_by_its_deadline_though_the_answer_trickles(liar: Liar, answer: bytes, begin: bytes) -> None:
    liar.answer = answer
    start = answer.index(begin)
    liar.trickling = slice(start, start + 250)
    try:
        # The complete answer would take five seconds.
        for outcome in ask(liar.url, lookup("json"), timeout=0.3):
            assert isinstance(outcome, DeadlineExceeded), outcome
    finally:
        liar.trickling = slice(0, 0)


def without(document: dict[str, Any], *path: Any) -> bytes:
    """Return a document as JSON, without the member at a path."""
    copy = orjson.loads(orjson.dumps(document))
    inner = copy
    for step in path[:-1]:
        inner = inner[step]
    del inner[path[-1]]
    return orjson.dumps(copy)


def cases() -> Iterator[tuple[str, Any, bytes]]:
    for form, body in GOOD.items():
        for name, wrong in (
            ("garbage", http(random.Random(3).randbytes(300))),
            ("nothing", http(b"")),
            ("cut", http(body[: len(body) // 2])),
            ("another form", http(GOOD["npy" if form == "arrow" else "arrow"])),
            ("no version", http(body, head="")),
            ("a version that is none", http(body, head="X-Shoal-Version: -7\r\n")),
            ("a position that is none", http(body, head="X-Shoal-Version: 7\r\nX-Shoal-Applied: users=1\r\n")),
            ("a redirection", http(body, status=302)),
            ("no content", http(b"", status=204)),
        ):
            yield f"{form}: {name}", lookup(form), wrong
    for name, columns in (
        ("too few rows", {"users:score": SCORE[:1], "users:text": ["a"]}),
        ("too many rows", {"users:score": [1.0, 2.0, 3.0], "users:text": ["a", "b", "c"]}),
        ("a feature too few", {"users:score": SCORE}),
        ("other features", {"users:score": SCORE, "users:other": ["a", None]}),
        ("another order", {"users:text": ["a", None], "users:score": SCORE}),
    ):
        yield f"arrow: {name}", lookup("arrow"), http(stream(columns))
    yield "arrow: two batches", lookup("arrow"), http(stream({"users:score": SCORE, "users:text": ["a", None]}, 2))
    yield "arrow: bytes behind it", lookup("arrow"), http(GOOD["arrow"][:-8] + b"nonsense")
    for rows, width in ((1, 2), (3, 2), (2, 1)):
        yield f"npy: {rows} x {width}", lookup("npy"), http(npy(np.ones((rows, width), np.float32)))
    for head in (b"1", b"(" * 9000, b"{'descr': '|O', 'fortran_order': False, 'shape': (2, 2), }", b"{'shape': 1}"):
        yield f"npy: {head[:60]!r}", lookup("npy"), http(GOOD["npy"][:8] + len(head).to_bytes(2, "little") + head)
    for shape in (b"(-2, 2)", b"(2, 9)", b"(999999999, 99999999)"):
        yield f"npy: {shape!r}", lookup("npy"), http(GOOD["npy"].replace(b"(2, 2)", shape))
    for text in (
        *(without(DOCUMENT, member) for member in DOCUMENT),
        without(DOCUMENT, "features", "users:text"),
        without(DOCUMENT, "status", "users"),
        without(DOCUMENT, "features", "users:text", 0),
        without(DOCUMENT, "event_timestamps", "users", 0),
        b"[]",
        b"null",
        orjson.dumps(DOCUMENT | {"status": []}),
        orjson.dumps(DOCUMENT | {"features": {"users:score": 1, "users:text": {}}}),
        orjson.dumps(DOCUMENT | {"status": {"users": "ok"}}),
    ):
        yield f"json: {text[:60]!r}", lookup("json"), http(text)
    documents: list[Any] = [
        ("views", SCHEMA, ("views", "services")),
        ("status", {"server": {}, "views": []}, ("server", "views")),
    ]
    for name, right, members in (*documents, ("ready", {"status": "ready", "version": 7}, ("status", "version"))):
        for wrong in (b"", b"<html>", b"[1]", *(without(right, member) for member in members)):
            yield f"{name}: {wrong[:40]!r}", {"views": views, "status": status, "ready": ready}[name], http(wrong)
    for member in SCHEMA["views"][0]:
        yield f"schema: no {member}", push, http(without(SCHEMA, "views", 0, member))
    yield "schema: a service without features", push, http(without(SCHEMA, "services", 0, "features"))
    fields: list[dict[str, Any]] = [
        {"join_keys": []},
        {"join_keys": [{"name": "x", "type": "float32"}]},
        {"features": "score"},
    ]
    for wrong_view in fields:
        view = SCHEMA["views"][0] | wrong_view
        yield f"schema: {wrong_view}", push, http(orjson.dumps(SCHEMA | {"views": [view]}))


def push(client: Any) -> Any:
    return client.push("users", {"users_id": [1, 2], "score": [1.0, 2.0]})


def views(client: Any) -> Any:
    return client.views()


def status(client: Any) -> Any:
    return client.status()


def ready(client: Any) -> Any:
    return client.ready()


def test_what_is_no_answer_is_refused_by_an_error_of_the_client(liar: Liar) -> None:
    for form, body in GOOD.items():
        liar.answer = http(
            body, head=f"X-Shoal-Version: 7\r\nX-Shoal-Applied: users={BEFORE_THE_LOG}@, items=12@1b\r\n"
        )
        for answer in ask(liar.url, lookup(form)):
            assert answer.version == 7, answer
            assert answer.applied == {"users": (BEFORE_THE_LOG, ""), "items": (12, "1b")}
    for name, do, liar.answer in cases():
        for outcome in ask(liar.url, do, timeout=20.0):
            if do is status:
                (outcome,) = outcome.values()
            assert outcome is False if do is ready else isinstance(outcome, AnswerInvalid), (name, outcome)


def test_an_answer_to_a_push_that_does_not_fit_is_refused() -> None:
    response = Response(200, {}, orjson.dumps(PUSHED), "http://h")
    assert read_pushed(response, 2) == (2, 0, 7)
    for wrong in (
        *({"rows": 1}, {"rows": 3}, {"rows": "2"}, {"rows": True}, {"rows": 2.0}, {"superseded": 3}),
        *({"superseded": -1}, {"version": None}),
    ):
        with pytest.raises(AnswerInvalid, match="http://h"):
            read_pushed(Response(200, {}, orjson.dumps(PUSHED | wrong), "http://h"), 2)
    for body in (b"", b"[]", b"3", *(without(PUSHED, member) for member in PUSHED)):
        with pytest.raises(AnswerInvalid, match="an invalid answer to a push"):
            read_pushed(Response(200, {}, body, "http://h"), 2)


def test_turned_bytes_give_an_answer_or_an_error_of_the_client() -> None:
    source = random.Random(5)
    columns = {
        "v:number": pa.array([2**60, None], pa.int64()),
        "v:text": ["some text", "more"],
        "v:list": pa.array([[1, 2], [3]], pa.list_(pa.int64())),
        "v:words": pa.array([["a", "b"], None], pa.list_(pa.string())),
        "v:vector": pa.array([[1.0, 2.0], None], pa.list_(pa.float32(), 2)),
        "v:at": pa.array([1, 2**62], pa.timestamp("us", tz="UTC")),
    }
    bodies = {"arrow": stream(columns), "npy": GOOD["npy"], "json": GOOD["json"], "schema": orjson.dumps(SCHEMA)}
    for form, body in bodies.items():
        for _ in range(400):
            turned = bytearray(body)
            for _ in range(source.choice([1, 1, 2, 8])):
                turned[source.randrange(len(turned))] = source.choice([0, 1, 127, 255, source.randrange(256)])
            response = Response(200, {"x-shoal-version": "7"}, bytes(turned[: source.choice([None, -1, -9])]))
            try:
                if form == "schema":
                    Schema.read(read_document(response), 0.0)
                    continue
                answer = read_answer(response, form, 2, None)
                for read in (answer.to_pydict, answer.to_numpy):
                    try:
                        read()
                    except ShoalError:
                        continue
            except ShoalError:
                continue


def test_what_servers_say_of_waiting_is_bounded(liar: Liar) -> None:
    body = b'{"error": {"code": "Overloaded", "message": "m"}}'
    for seconds, told in (("9" * 400, None), ("\u0663", None), ("86400", 86400.0), ("-1", None)):
        liar.answer = http(body, 503, f"Retry-After: {seconds}\r\n".encode().decode("latin-1"))
        with Client(liar.url, timeout=20.0, max_tries=1) as client:
            with pytest.raises(ShoalError) as refused:
                client.lookup(FEATURES, KEYS)
            assert getattr(refused.value, "retry_after", 0) == told
            assert client._core.replicas[0].not_before < time.monotonic() + 31


@contextmanager
def unaccepting() -> Iterator[str]:
    """The URL of a server that accepts no connection, because its queue of waiting connections is full."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting = []
        for _ in range(8):
            waiting.append(socket.socket())
            waiting[-1].setblocking(False)
            waiting[-1].connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        for connection in waiting:
            connection.close()


def test_a_server_that_cannot_be_reached_costs_a_connect_timeout_and_no_deadline(liar: Liar) -> None:
    liar.answer = http(GOOD["json"])
    with unaccepting() as url:
        for outcome in ask(url, lookup("json"), timeout=60.0, connect_timeout=0.1):
            assert isinstance(outcome, NoAnswer), outcome
        for outcome in ask([url, liar.url], lookup("json"), timeout=60.0, connect_timeout=0.1):
            assert not isinstance(outcome, ShoalError), outcome


def test_servers_that_cannot_be_reached_take_no_time_from_others(liar: Liar) -> None:
    liar.answer = http(b'{"server": {}, "views": []}')
    with ExitStack() as opened:
        urls = [opened.enter_context(unaccepting()) for _ in range(8)]
        for outcome in ask([*urls, liar.url], status, timeout=6.0, connect_timeout=1.0):
            assert outcome[liar.url] == {"server": {}, "views": []}
            assert all(isinstance(outcome[url], NoAnswer) for url in urls)
