"""Whatever is sent, the server answers with an error that is the client's, and goes on."""

import gzip
import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.export_root import ExportRoot
from tests import stores
from tests.every_type import ITEMS, USERS, item_rows, user_rows
from tests.server.serving import Connection, Server

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
def connection(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Connection]:
    directory = tmp_path_factory.mktemp("fuzz")
    root = ExportRoot(directory / "root")
    stores.publish_snapshot(root, ITEMS, item_rows(5))
    stores.publish_snapshot(root, USERS, user_rows(5))
    with Server(directory / "store", {"root": str(root)}, max_keys=1000) as server:
        server.await_views("items", "users")
        with server.connection() as connection:
            yield connection
        assert "Traceback" not in server.log


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
    ],
    ids=["deep list", "deep object", "many keys", "twice", "invalid UTF-8", "many rows"],
)
def test_hard_bodies(connection: Connection, path: str, body: bytes) -> None:
    ask(connection, path, body)


def test_a_bomb_of_zeros_is_refused(connection: Connection) -> None:
    body = gzip.compress(b" " * (64 << 20))
    answer = connection.ask("POST", "/v1/push", body, **{"Content-Encoding": "gzip"})
    assert answer.status == 413
