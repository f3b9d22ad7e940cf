"""Whatever a client sends, the server answers without an internal error and keeps serving."""

import gzip
import http.client
import json
import os
import socket
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.engine.process.control import unix_address, writer_socket_path
from shoal.engine.root.export_root import ExportRoot
from tests import stores
from tests.every_type import ITEMS, USERS, item_rows, user_rows
from tests.server.serving import PATIENCE_SECONDS, Answer, Connection, Server

ARROW = "application/vnd.apache.arrow.stream"

EXAMPLES = int(os.environ.get("SHOAL_FUZZ_EXAMPLES", "150"))
FEATURES = [feature.name for feature in ITEMS.features]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["items", "items:*", "users:score", "item-1", "2026-01-01T00:00:00Z", "AP8=", "1h", "\ud800"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
KEYS = st.sampled_from(["items_id", "users_id", "x", "event_timestamp", *FEATURES])
COLUMNS = st.dictionaries(KEYS, JSON | st.lists(JSON, max_size=4), max_size=6)
BODIES = {
    "/v1/lookup": {
        "features": st.just(["items:*"]) | JSON,
        "service": JSON,
        "entities": COLUMNS,
        "max_age": JSON,
        "stale": JSON,
    },
    "/get-online-features": {
        "features": st.just(["users:score"]) | JSON,
        "feature_service": JSON,
        "entities": COLUMNS,
        "full_feature_names": JSON,
    },
    "/v1/push": {"view": st.sampled_from(["items", "users"]) | JSON, "rows": COLUMNS, "deletes": COLUMNS},
    "/push": {"push_source_name": st.just("items") | JSON, "df": COLUMNS, "to": st.just("online") | JSON},
    "/write-to-online-store": {"feature_view_name": st.just("users") | JSON, "df": COLUMNS},
    "/v1/reload": {"view": st.just("nope") | JSON, "snapshot": JSON, "accept_schema_change": JSON},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("fuzz")
    root = ExportRoot(directory / "root")
    stores.publish_snapshot(root, ITEMS, item_rows(5))
    stores.publish_snapshot(root, USERS, user_rows(5))
    with Server(directory / "store", {"root": str(root)}, max_keys=1000, max_values=4_000_000) as server:
        server.await_views("items", "users")
        yield server
        # In the writer, aiohttp itself logs requests that are not HTTP.
        assert " failed\nTraceback" not in server.log


@pytest.fixture
def connection(server: Server) -> Iterator[Connection]:
    with server.connection() as connection:
        yield connection


def ask(connection: Connection, path: str, body: bytes) -> None:
    answer = connection.ask("POST", path, body, **{"Content-Type": "application/json"})
    assert answer.status < 500 or answer.status == 501, (path, body, answer.body)
    if answer.status >= 400:
        json.loads(answer.body)


@pytest.mark.parametrize("path", BODIES)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_bodies_that_are_nearly_right(connection: Connection, path: str, data: st.DataObject) -> None:
    members: Any = st.fixed_dictionaries({}, optional=BODIES[path])
    ask(connection, path, json.dumps(data.draw(members)).encode())


@pytest.mark.parametrize("path", BODIES)
@settings(max_examples=EXAMPLES // 2, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=st.binary(max_size=40) | JSON.map(lambda content: json.dumps(content).encode()))
def test_any_bytes_and_any_json(connection: Connection, path: str, body: bytes) -> None:
    ask(connection, path, body)


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"entities": {"items_id": [' + b"1," * 200_000 + b"1]}}",
        b'{"entities": {"items_id": ["a"]}, "entities": {"items_id": ["b"]}}',
        b'{"features": ["items:*"], "entities": {"items_id": ["\xff"]}}',
        b'{"view": "items", "rows": {"items_id": [' + b'"a",' * 5_000 + b'"a"]}}',
        b'{"entities": {' + b",".join(b'"k%d": [1]' % number for number in range(1_000_000)) + b"}}",
        b'{"features": ["users:score"], "entities": {"users_id": [NaN, Infinity, -Infinity]}, "max_age": NaN}',
        b'{"view": "users", "rows": {"users_id": [1], "score": [1e999]}}',
        b'{"entities": {"users_id": [' + b"9" * 100_000 + b"]}}",
        b'{"a": "' + b"x" * (33 << 20) + b'"}',
    ],
    ids=[
        "deep list",
        "deep object",
        "many keys",
        "twice",
        "invalid UTF-8",
        "many rows",
        "many members",
        "NaN",
        "overflow",
        "digits",
        "huge",
    ],
)
def test_hard_bodies(connection: Connection, path: str, body: bytes) -> None:
    ask(connection, path, body)


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("depth", [100, 300, 1000])
def test_a_value_in_many_others(connection: Connection, path: str, depth: int) -> None:
    """The nesting is as deep as the parser accepts, and deeper than Python's encoder can write."""
    valid = {"features": ["items:*"], "view": "items", "push_source_name": "items", "feature_view_name": "users"}
    for value in ("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth):
        for member in BODIES[path]:
            others = {name: json.dumps(valid[name]) for name in BODIES[path] if name in valid and name != member}
            for content in (value, f'{{"items_id": {value}}}', f'{{"items_id": ["a"], "count": [{value}]}}'):
                whole = others | {member: content}
                body = ", ".join(f'"{name}": {text}' for name, text in whole.items())
                ask(connection, path, f"{{{body}}}".encode())
                ask(connection, path, f'{{{body}, "entities": {{"items_id": ["a"]}}}}'.encode())


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_bomb_of_zeros_is_refused(server: Server, path: str, encoding: str) -> None:
    zeros = b" " * (64 << 20)
    body = gzip.compress(zeros, 1) if encoding == "gzip" else zlib.compress(zeros, 1)
    assert server.ask("POST", path, body, **{"Content-Encoding": encoding}).status == 413


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd"])
def test_a_body_that_is_not_packed_as_it_says_is_refused(server: Server, encoding: str) -> None:
    head = b"POST /v1/lookup HTTP/1.1\r\nContent-Length: 2\r\nContent-Encoding: %s\r\n\r\n" % encoding.encode()
    # The body comes together with the head, or after it.
    for pause in (0.0, 0.1):
        with server.raw_socket() as client:
            client.sendall(head)
            time.sleep(pause)
            # Some requests are rejected after the head.
            with suppress(ConnectionError):
                client.sendall(b"{}")
            answer = _answer(client)
        assert answer.status == 400
        assert answer.error[0] in ("LookupInvalid", "HTTPBadRequest")


def _answer(client: socket.socket) -> Answer:
    answer = http.client.HTTPResponse(client)
    answer.begin()
    return Answer(answer.status, {}, answer.read())


def test_what_is_no_http_is_answered_in_json(server: Server) -> None:
    for sent in (b"\xff\xfe\r\n\r\n", b"GET /ready HTTP/9.9\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n"):
        with server.raw_socket() as client:
            client.sendall(sent)
            answer = _answer(client)
        assert (answer.status, answer.error[0]) == (400, "HTTPBadRequest")
    assert "Traceback" not in server.log


@pytest.mark.parametrize(
    ("path", "member"), [("/v1/lookup", "entities"), ("/v1/push", "rows"), ("/get-online-features", "entities")]
)
def test_a_million_names_are_refused_before_each_is_looked_at(server: Server, path: str, member: str) -> None:
    names = b",".join(b'"%d":1.5' % number for number in range(1_000_000))
    answer = server.ask("POST", path, b'{"%s":{%s}}' % (member.encode(), names), **{"Content-Type": "application/json"})
    assert answer.status == 413
    assert b"has 1000000 members, a request may have 10000" in answer.body


def test_a_million_features_are_refused_before_each_is_looked_at(server: Server) -> None:
    answer = server.ask("POST", "/v1/lookup", {"features": [1] * 1_000_000, "entities": {"users_id": [1]}})
    assert (answer.status, answer.error[0]) == (413, "RequestTooLarge")


@pytest.mark.parametrize("name", ["Accept", "Authorization", "Idempotency-Key", "Content-Type", "X-Any"])
@pytest.mark.parametrize("value", ["\xff\xfe", "\xc3\xa9", "a" * 4000, "*/*;q=nan", ",;,=", "text/x;\xe9"])
def test_headers_of_any_bytes(server: Server, name: str, value: str) -> None:
    lookup = {"features": ["users:score"], "entities": {"users_id": [1]}}
    for path, body in (("/v1/lookup", lookup), ("/v1/push", {}), ("/get-online-features", lookup), ("/push", {})):
        answer = server.ask("POST", path, body, **{name: value})
        assert answer.status < 500
        json.loads(answer.body)


def test_an_error_is_short_whatever_it_repeats(connection: Connection) -> None:
    asked = {"features": ["users:score"], "entities": {f"key {number}": ["x"] for number in range(10_000)}}
    for answer in (
        connection.ask("POST", "/v1/lookup", asked),
        connection.ask("POST", "/get-online-features", asked),
        connection.ask("POST", "/v1/lookup", {"features": ["x" * 1_000_000], "entities": {}}),
        connection.ask("POST", "/get-online-features", {"features": 1, "entities": {"users_id": ["x" * 1_000_000]}}),
        connection.ask("POST", "/get-online-features", {"features": [1] * 10_000, "entities": {}}),
    ):
        assert answer.status in (400, 422)
        assert len(answer.body) < 10_000


@pytest.mark.parametrize("path", ["/v1/lookup", "/get-online-features"])
def test_more_than_an_answer_holds_is_refused(connection: Connection, path: str) -> None:
    of_many = {"features": ["users:score"] * 5000, "entities": {"users_id": [1] * 900}}
    too_many = {"features": ["users:*"] * 6000, "entities": {"users_id": [1]}}
    for asked, words in ((of_many, b"an answer may hold at most"), (too_many, b"a request may name at most 10000")):
        answer = connection.ask("POST", path, asked, Accept="application/json")
        assert answer.status == 413
        assert words in answer.body


# --- Arrow streams that are larger than they look ----------------------------------------------------------------


def arrow(columns: dict[str, Any], names: list[str] | None = None, **options: Any) -> bytes:
    arrays = [values if isinstance(values, pa.Array) else pa.array(values) for values in columns.values()]
    table = pa.Table.from_arrays(arrays, names or list(columns))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as stream:
        stream.write_table(table)
    return bytes(sink.getvalue())


def repeated(value: Any, times: int) -> pa.Array:
    return pa.RunEndEncodedArray.from_arrays(pa.array([times], pa.int32()), pa.array([value]))


def push_arrow(connection: Connection, body: bytes) -> Answer:
    return connection.ask("POST", "/v1/push?view=users", body, **{"Content-Type": ARROW})


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_arrow_that_unpacks_to_too_much_is_refused(connection: Connection, codec: str) -> None:
    body = arrow({"users_id": [1] * 40, "text": ["x" * 1_000_000] * 40}, compression=codec)
    assert len(body) < 1_000_000
    answer = push_arrow(connection, body)
    assert (answer.status, answer.error[0]) == (413, "RequestTooLarge")
    assert "unpacks to" in answer.error[1]


def test_arrow_that_is_packed_and_fits_is_taken(connection: Connection) -> None:
    body = arrow({"users_id": [1] * 40, "text": ["x" * 1000] * 40}, compression="zstd")
    assert push_arrow(connection, body).json["rows"] == 40
    views = pa.array(["x", None, "y" * 100], pa.string_view())
    assert push_arrow(connection, arrow({"users_id": [1, 2], "text": views[1:]})).json["rows"] == 2


def test_arrow_that_repeats_a_value_is_refused(connection: Connection) -> None:
    rows = 2**31 - 1
    assert push_arrow(connection, arrow({"users_id": repeated(1, rows), "score": repeated(1.0, rows)})).status == 413
    once = pa.array(["x" * 5_000_000])
    views = np.tile(np.array([5_000_000, 0x78787878, 0, 0], np.int32), 1000)
    for text in (
        pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int16()), once),
        pa.Array.from_buffers(pa.string_view(), 1000, [None, pa.py_buffer(views), once.buffers()[2]]),
    ):
        answer = push_arrow(connection, arrow({"users_id": list(range(1000)), "text": text}))
        assert answer.status == 413
        assert "unpacks to 5000000000 bytes" in answer.error[1]


def test_a_column_that_comes_twice_is_refused(connection: Connection) -> None:
    answer = push_arrow(connection, arrow({"a": [1], "b": [1.0], "c": [2.0]}, ["users_id", "score", "score"]))
    assert (answer.status, answer.error[1]) == (400, "the stream has 2 columns 'score'; send one")


# --- the writer's socket -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def control(server: Server) -> Iterator[Connection]:
    connection = Connection(f"unix:{writer_socket_path(server.store)}")
    yield connection
    connection.close()


ORDERS = st.one_of(
    st.binary(max_size=40),
    JSON.map(lambda content: json.dumps(content).encode()),
    st.just(b"[" * 100_000),
    COLUMNS.map(lambda columns: json.dumps({"view": "users", **columns}).encode()),
    st.sampled_from([arrow({"users_id": [1]}), arrow({"__key_hash": ["x"]}), arrow({"__key_hash": [1]}) * 2]),
)
ORDER_PATHS = ["/reload", "/push", "/push?view=users", "/push?view=%ff", "/views", "/views/no", "/status", "/"]


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH"]), path=st.sampled_from(ORDER_PATHS), body=ORDERS
)
def test_orders_of_any_kind(control: Connection, method: str, path: str, body: bytes) -> None:
    answer = control.ask(method, path, body)
    assert answer.status < 500, (method, path, body, answer.body)
    json.loads(answer.body)


def test_what_is_no_http_on_the_writers_socket(server: Server) -> None:
    for sent in (
        b"\xff\xfe\r\n\r\n",
        b"POST /push HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    ):
        with socket.socket(socket.AF_UNIX) as client, unix_address(writer_socket_path(server.store)) as address:
            client.settimeout(PATIENCE_SECONDS)
            client.connect(address)
            client.sendall(sent)
            assert b" 400 " in client.recv(4096)
    assert server.ask("POST", "/v1/reload", {}).status == 200
