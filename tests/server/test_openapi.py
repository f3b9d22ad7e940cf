"""The OpenAPI document: it is valid, it covers all endpoints, and a real server's answers match it, whatever a client
sends."""

import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from openapi_spec_validator import validate
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from shoal.engine.process.control import WriterClient
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.server.admission import TIMEOUT_HEADER
from shoal.engine.server.app import Application
from shoal.engine.server.metrics import Metrics
from shoal.engine.server.metrics_files import MetricsFiles
from shoal.engine.server.openapi import DOCUMENT
from shoal.engine.server.outgoing import Outgoing
from shoal.engine.server.protection import Auth
from shoal.engine.server.served_store import ServedStore
from shoal.engine.server.served_tables import ServedTables
from shoal.engine.server.settings import server_settings
from tests import stores
from tests.every_type import ITEMS, SERVICE, USERS, item_rows, user_rows
from tests.server.serving import Server, eventually

EXAMPLES = int(os.environ.get("SHOAL_FUZZ_EXAMPLES", "10"))
ARROW = "application/vnd.apache.arrow.stream"
AS_DOCUMENTED = [status_code_conformance, content_type_conformance, response_schema_conformance]
PUSHED = {"users_id": [1], "score": [0.5], "text": ["x"], "event_timestamp": ["2026-01-01T00:00:00Z"]}

document: dict[str, Any] = orjson.loads(DOCUMENT)
api = schemathesis.openapi.from_dict(document)


@schemathesis.serializer(ARROW)
def as_bytes(context: schemathesis.SerializationContext, value: Any) -> bytes:
    """Return the bytes to send as an Arrow stream. The document has no schema to generate a valid stream from."""
    return value if isinstance(value, bytes) else orjson.dumps(value, default=str, option=orjson.OPT_NON_STR_KEYS)


def test_the_document_is_valid_and_of_this_version() -> None:
    validate(document)
    assert document["info"]["version"] == version("shoal")


def test_the_document_has_the_endpoints_that_the_server_has(tmp_path: Path) -> None:
    settings = server_settings(store=tmp_path)
    served_store = ServedStore(tmp_path)
    metrics = Metrics(tmp_path, MetricsFiles(tmp_path / "missing"))
    tables = ServedTables(settings, served_store, metrics)
    writer = WriterClient(tmp_path)
    outgoing = Outgoing(settings)
    application = Application(settings, Auth(settings), served_store, metrics, writer, tables, outgoing)
    served = {path: {method.lower() for method in methods} for path, methods in application.endpoints.items()}
    assert {path: set(operations) for path, operations in document["paths"].items()} == served
    for path, methods in application.endpoints.items():
        for method, endpoint in methods.items():
            operation = document["paths"][path][method.lower()]
            takes_token = {} not in operation.get("security", [None]) and operation.get("security") != []
            assert takes_token == (endpoint.role is not None), path
            if endpoint.role is not None:
                assert f"role {endpoint.role}" in operation["description"]
                assert {"401", "403"} <= set(operation["responses"])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("openapi")
    root = ExportRoot(directory / "root")
    stores.publish_snapshot(root, ITEMS, item_rows(5))
    stores.publish_snapshot(root, USERS, user_rows(5))
    root.publish_services((SERVICE,))
    with Server(directory / "store", {"root": str(root)}, max_keys=1000) as server:
        server.await_ready()
        eventually(lambda: len(server.ask("GET", "/v1/views").json["views"]) == 2, "two views")
        yield server
        assert "Traceback" not in server.log


def test_the_document_is_served(server: Server) -> None:
    answer = server.ask("GET", "/openapi.json")
    assert (answer.status, answer.headers["content-type"], answer.body) == (200, "application/json", DOCUMENT)


@pytest.mark.parametrize(
    ("method", "path", "body", "headers"),
    [
        ("POST", "/v1/lookup", {"features": ["items:*"], "entities": {"items_id": ["item-1", "extremes", "-"]}}, {}),
        ("POST", "/v1/lookup", {"service": "ranking", "entities": {"items_id": ["item-1"], "users_id": 3}}, {}),
        ("POST", "/v1/lookup", {"features": ["users:*"], "entities": {"users_id": [1]}}, {"Accept": ARROW}),
        ("POST", "/v1/lookup", {"features": ["users:score"], "entities": {"users_id": [1]}}, {"Accept": "*/x-npy"}),
        (
            "POST",
            "/v1/lookup",
            {"features": ["users:score"], "entities": {"users_id": [1]}},
            {"Accept": "application/x-npy"},
        ),
        (
            "POST",
            "/v1/lookup",
            {"features": ["users:score"], "entities": {"users_id": [2]}, "max_age": "1s", "stale": "fail"},
            {},
        ),
        ("POST", "/v1/lookup", {"features": ["users:score"], "entities": {"users_id": [1] * 2000}}, {}),
        ("POST", "/v1/push", {"view": "users", "rows": PUSHED}, {"Idempotency-Key": "one"}),
        ("POST", "/v1/push", {"view": "nope", "rows": PUSHED}, {}),
        ("POST", "/get-online-features", {"features": ["items:*"], "entities": {"items_id": ["item-1", "-"]}}, {}),
        ("POST", "/get-online-features", {"features": ["nope:x"], "entities": {"items_id": ["item-1"]}}, {}),
        ("POST", "/get-online-features", {"entities": 5}, {}),
        ("POST", "/push", {"push_source_name": "users", "df": PUSHED}, {}),
        ("POST", "/push", {"push_source_name": "nope", "df": PUSHED}, {}),
        ("POST", "/write-to-online-store", {"feature_view_name": "users", "df": PUSHED}, {}),
        ("POST", "/v1/reload", {}, {}),
        ("POST", "/v1/reload", {"view": "nope"}, {}),
        ("POST", "/materialize", {}, {}),
        ("GET", "/v1/views", None, {}),
        ("GET", "/v1/status", None, {}),
        ("GET", "/ready", None, {}),
        ("GET", "/metrics", None, {"Accept": "application/openmetrics-text"}),
    ],
)
def test_usual_requests_are_answered_as_documented(
    server: Server, method: str, path: str, body: Any, headers: dict[str, str]
) -> None:
    given: dict[str, Any] = {} if body is None else {"body": body, "media_type": "application/json"}
    case = api[path][method].Case(headers=headers, **given)
    case.call_and_validate(base_url=server.record.address, checks=AS_DOCUMENTED)


@api.parametrize()
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_is_sent_is_answered_as_documented(case: "schemathesis.Case[Any]", server: Server) -> None:
    refused_always = case.operation.path.startswith("/materialize")  # Always refused with 501.
    checks = AS_DOCUMENTED if refused_always else [*AS_DOCUMENTED, not_a_server_error]
    if case.headers and str(case.headers.get(TIMEOUT_HEADER, "")).isdigit():
        # A timeout of a few milliseconds may legitimately be too short.
        case.headers[TIMEOUT_HEADER] = "60000"
    case.call_and_validate(base_url=server.record.address, checks=checks)
