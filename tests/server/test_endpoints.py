"""Every endpoint of a real server with two workers and a writer that follows an export root."""

import gzip
import io
import json
import re
import socket
import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests import stores
from tests.every_type import item_rows
from tests.server.serving import Server, eventually

KEYS = ["extremes", "empties", "item-0", "item-1", "none"]


# --- lookups -------------------------------------------------------------------------------------------------------


def test_lookup_in_json(server: Server) -> None:
    answer = server.lookup(["items:text", "users:score"], {"items_id": ["empties", "none"], "users_id": [2, 99]})
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.json == {
        "version": answer.version,
        "keys": 2,
        "features": {"items:text": ["", None], "users:score": [0.5, None]},
        "status": {"items": ["PRESENT", "NOT_FOUND"], "users": ["PRESENT", "NOT_FOUND"]},
        "event_timestamps": {"items": ["2026-01-01T00:00:00Z", None], "users": ["2026-01-01T00:00:00Z", None]},
    }


def test_a_scalar_entity_holds_for_every_row(server: Server) -> None:
    answer = server.lookup(["items:small", "users:text"], {"items_id": ["empties", "extremes"], "users_id": 7})
    assert answer.json["features"] == {"items:small": [0, -(2**31)], "users:text": ["user 7"] * 2}


def test_lookup_by_service(server: Server) -> None:
    body = {"service": "ranking", "entities": {"items_id": ["empties"], "users_id": [1]}}
    answer = server.ask("POST", "/v1/lookup", body)
    assert answer.json["features"] == {"items:single": [0.0], "users:score": [0.25], "users:text": ["user 1"]}


def test_all_formats_say_the_same(server: Server) -> None:
    body = {"features": ["items:single", "items:vector"], "entities": {"items_id": KEYS}}
    as_json = server.ask("POST", "/v1/lookup", body)
    as_arrow = server.ask("POST", "/v1/lookup", body, Accept="application/vnd.apache.arrow.stream")
    as_npy = server.ask("POST", "/v1/lookup", body, Accept="application/x-npy")
    assert as_arrow.headers["content-type"] == "application/vnd.apache.arrow.stream"
    assert as_npy.headers["content-type"] == "application/x-npy"
    rows = {row["items_id"]: row for row in item_rows(20)}
    single = np.array([rows.get(key, {}).get("single") for key in KEYS], np.float32)
    vector = np.array([rows.get(key, {}).get("vector") or [np.nan] * 3 for key in KEYS], np.float32)
    np.testing.assert_array_equal(np.load(io.BytesIO(as_npy.body)), np.column_stack([single, vector]))
    table = pa.ipc.open_stream(as_arrow.body).read_all()
    np.testing.assert_array_equal(np.array(table.column("items:single").to_pylist(), np.float32), single)
    np.testing.assert_array_equal(
        np.array([row or [np.nan] * 3 for row in table.column("items:vector").to_pylist()], np.float32), vector
    )
    np.testing.assert_array_equal(np.array(as_json.json["features"]["items:single"], np.float32), single)
    assert {answer.version for answer in (as_json, as_arrow, as_npy)} == {as_json.json["version"]}


@pytest.mark.parametrize(
    ("more", "clicks", "status"),
    [
        ({}, [1, None], ["PRESENT", "OUTSIDE_MAX_AGE"]),
        ({"stale": "serve"}, [1, 2], ["PRESENT", "OUTSIDE_MAX_AGE"]),
        ({"max_age": "3d"}, [1, 2], ["PRESENT", "PRESENT"]),
        ({"max_age": "3d", "stale": "fail"}, [1, 2], ["PRESENT", "PRESENT"]),
    ],
)
def test_ages(server: Server, more: dict[str, str], clicks: list[int], status: list[str]) -> None:
    answer = server.lookup(["recent:clicks"], {"recent_id": ["fresh", "stale"]}, **more).json
    assert answer["features"]["recent:clicks"] == clicks
    assert answer["status"]["recent"] == status


def test_stale_rows_can_fail_a_lookup(server: Server) -> None:
    answer = server.lookup(["recent:clicks"], {"recent_id": ["fresh", "stale"]}, stale="fail")
    assert answer.status == 409
    assert answer.error[0] == "StaleFeatures"
    assert "1 of 2 rows of view 'recent' are older" in answer.error[1]


def test_a_matrix_names_the_columns_that_its_request_does_not(server: Server) -> None:
    entities = {"items_id": ["empties"], "users_id": [1], "recent_id": ["none"]}
    npy = {"Accept": "application/x-npy"}
    asked: Any
    for asked, columns in (
        ({"service": "numbers"}, "items:vector[3],recent:clicks,recent:rate,items:single"),
        ({"features": ["items:large", "pairs:*"]}, "items:large,pairs:seen,pairs:times"),
        ({"features": ["items:large", "items:vector"]}, None),
    ):
        answer = server.ask("POST", "/v1/lookup", asked | {"entities": entities}, **npy)
        assert answer.headers.get("x-shoal-columns") == columns
    assert (
        "x-shoal-columns" not in server.ask("POST", "/v1/lookup", {"service": "numbers", "entities": entities}).headers
    )


def test_packed_bodies(server: Server) -> None:
    body = json.dumps({"features": ["users:score"], "entities": {"users_id": [1]}}).encode()
    packed = {"Content-Encoding": "gzip"}
    assert server.ask("POST", "/v1/lookup", gzip.compress(body), **packed).json["features"] == {"users:score": [0.25]}


# --- rejected requests ---------------------------------------------------------------------------------------------

USER = {"users_id": [1]}


@pytest.mark.parametrize(
    ("body", "status", "code", "message"),
    [
        (b"{", 400, "LookupInvalid", "the body is not JSON in UTF-8"),
        (b'{"features": ["\xff"]}', 400, "LookupInvalid", "the body is not JSON in UTF-8"),
        (b"", 400, "LookupInvalid", "the body is not JSON in UTF-8"),
        (
            b'{"features": ["doc:a"], "features": ["doc:text"], "entities": {"doc_id": [1]}}',
            400,
            "LookupInvalid",
            "'features' appears twice in an object of the body; give it once",
        ),
        (
            b'{"features": ["doc:a"], "entities": {"doc_id" : [1], "doc\\u005fid": [2]}}',
            400,
            "LookupInvalid",
            "'doc_id' appears twice in an object of the body; give it once",
        ),
        *(
            (
                b'{"features": ["doc:a"], "entities"%b: {"doc_id"%b: [1]}, "entities"%b:{}}' % (spaces, spaces, spaces),
                400,
                "LookupInvalid",
                "'entities' appears twice in an object of the body; give it once",
            )
            for spaces in (b"\t", b"  ", b"\n", b"\r\n\t ")
        ),
        ([], 400, "LookupInvalid", "the body is []: Input should be a valid dictionary"),
        ({"features": ["users:score"]}, 400, "LookupInvalid", "the field 'entities' is missing"),
        ({"entities": USER}, 400, "LookupInvalid", "give either features, a list of view:feature, or service"),
        ({"features": ["a:b"], "service": "x", "entities": USER}, 400, "LookupInvalid", "give either features"),
        ({"features": [], "entities": USER}, 400, "LookupInvalid", "the request names no features"),
        ({"features": [1], "entities": USER}, 400, "LookupInvalid", "features.0 is 1: Input should be a valid string"),
        (
            {"features": "users:score", "entities": USER},
            400,
            "LookupInvalid",
            "features is 'users:score': Input should",
        ),
        ({"features": ["score"], "entities": USER}, 400, "LookupInvalid", "'score' is not a feature reference"),
        (
            {"features": ["nope:x"], "entities": USER},
            404,
            "UnknownFeature",
            "no view 'nope'; it has items, pairs, recent",
        ),
        ({"features": ["users:x"], "entities": USER}, 404, "UnknownFeature", "no feature 'x'; it has score, text"),
        ({"service": "x", "entities": USER}, 404, "UnknownFeature", "no feature service 'x'; it has numbers, ranking"),
        (
            {"features": ["users:score"], "entities": USER, "feature": 1},
            400,
            "LookupInvalid",
            "unknown field 'feature'; the fields are features, service, entities, max_age, stale",
        ),
        (
            {"features": ["users:score"], "entities": {"items_id": ["a"]}},
            400,
            "LookupInvalid",
            "view 'users' is looked up by 'users_id', which is not among the entities (items_id)",
        ),
        (
            {"features": ["users:score"], "entities": {"users_id": ["1"]}},
            400,
            "LookupInvalid",
            "int64, but holds string",
        ),
        ({"features": ["users:score"], "entities": {"users_id": [1.5]}}, 400, "LookupInvalid", "such as 1.5"),
        ({"features": ["users:score"], "entities": {"users_id": [True]}}, 400, "LookupInvalid", "holds bool"),
        ({"features": ["users:score"], "entities": {"users_id": [1, None]}}, 400, "LookupInvalid", "is null in row 1"),
        ({"features": ["users:score"], "entities": {"users_id": {"a": 1}}}, 400, "LookupInvalid", "is not an entity"),
        ({"features": ["users:score"], "entities": {"users_id": 1.5}}, 400, "LookupInvalid", "1.5 is not an entity"),
        (
            {"features": ["users:*", "items:*"], "entities": {"users_id": [1, 2], "items_id": ["a"]}},
            400,
            "LookupInvalid",
            "entity 'items_id' has 1 values, but 'users_id' has 2",
        ),
        (
            {"features": ["users:score"], "entities": USER, "max_age": "soon"},
            400,
            "LookupInvalid",
            "max_age: 'soon' is not a duration; give a whole number and one of s, m, h, d, w",
        ),
        ({"features": ["users:score"], "entities": USER, "max_age": 60}, 400, "LookupInvalid", "max_age: 60 is not a"),
        (
            {"features": ["users:score"], "entities": USER, "stale": "x"},
            400,
            "LookupInvalid",
            "stale is 'x': Input sho",
        ),
        (
            {"features": ["users:score"], "entities": {"users_id": list(range(51))}},
            413,
            "RequestTooLarge",
            "entity 'users_id' has 51 values, the server accepts at most 50",
        ),
        (b" " * 20_001, 413, "RequestTooLarge", "the body has 20001 bytes, the server accepts at most 20000"),
    ],
)
def test_refused_lookups(server: Server, body: Any, status: int, code: str, message: str) -> None:
    answer = server.ask("POST", "/v1/lookup", body)
    assert answer.status == status
    assert answer.error[0] == code
    assert message in answer.error[1]
    assert answer.version > 0


def test_a_body_that_is_too_large_once_unpacked(server: Server) -> None:
    answer = server.ask("POST", "/v1/lookup", gzip.compress(b" " * 1_000_000), **{"Content-Encoding": "gzip"})
    assert (answer.status, answer.error[0]) == (413, "RequestTooLarge")


def test_a_body_that_cannot_be_unpacked(server: Server) -> None:
    answer = server.ask("POST", "/v1/lookup", b"not gzip", **{"Content-Encoding": "gzip"})
    assert (answer.status, answer.error[0]) == (400, "LookupInvalid")


@pytest.mark.parametrize("path", ["/v1/lookup", "/v1/push", "/v1/reload", "/get-online-features", "/push"])
@pytest.mark.parametrize("encoding", ["foo", "x-gzip", "br", "zstd", "gzip, gzip", "identity, foo"])
def test_a_body_in_an_unknown_encoding(server: Server, path: str, encoding: str) -> None:
    body = {"features": ["users:score"], "entities": USER}
    answer = server.ask("POST", path, body, **{"Content-Encoding": encoding})
    assert answer.status == 415
    assert b"gzip or deflate" in answer.body
    assert server.ask("POST", "/v1/lookup", body, **{"Content-Encoding": "Identity"}).status == 200


def test_a_client_that_sends_no_more_is_answered(server: Server) -> None:
    body = json.dumps({"features": ["users:score"], "entities": USER}).encode()
    request = b"POST /v1/lookup HTTP/1.1\r\nHost: shoal\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    for sent, statuses in ((request, [b"200"]), (3 * request, 3 * [b"200"]), (request + request[:50], [b"200"])):
        with server.raw_socket() as client:
            client.sendall(sent)
            client.shutdown(socket.SHUT_WR)
            assert re.findall(rb"HTTP/1.1 (\d+)", client.makefile("rb").read()) == statuses


def test_formats_that_answers_do_not_come_in(server: Server) -> None:
    body = {"features": ["users:text"], "entities": USER}
    answer = server.ask("POST", "/v1/lookup", body, Accept="text/html")
    assert (answer.status, answer.error[0]) == (406, "NotAcceptable")
    answer = server.ask("POST", "/v1/lookup", body, Accept="application/x-npy")
    assert answer.status == 400
    assert answer.error == (
        "LookupInvalid",
        "users:text is string, which has no place in a matrix; ask for Arrow or JSON",
    )


def test_unknown_paths_and_methods(server: Server) -> None:
    answer = server.ask("GET", "/v2/lookup")
    assert (answer.status, *answer.error) == (404, "HTTPNotFound", "GET /v2/lookup: Not Found")
    answer = server.ask("GET", "/v1/lookup")
    assert (answer.status, *answer.error) == (405, "HTTPMethodNotAllowed", "GET /v1/lookup: Method Not Allowed")
    assert answer.headers["allow"] == "POST"


def test_a_client_that_leaves_in_the_middle_does_no_harm(server: Server) -> None:
    workers = server.record.workers
    with server.raw_socket() as leaving:
        leaving.sendall(b"POST /v1/lookup HTTP/1.1\r\nHost: shoal\r\nContent-Length: 100\r\n\r\n{")
    assert server.lookup(["users:score"], USER).status == 200
    assert server.record.workers == workers
    assert " failed" not in server.log


@pytest.mark.parametrize("path", ["/v1/lookup", "/get-online-features"])
def test_clients_that_wait_to_be_told_to_send_a_body_are_told(server: Server, path: str) -> None:
    body = json.dumps({"features": ["users:score"], "entities": USER}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: shoal\r\nExpect: 100-continue\r\nContent-Length: "
    with server.raw_socket() as client, client.makefile("rb") as answers:
        client.sendall(f"{head}{len(body)}\r\n\r\n".encode())
        assert (answers.readline(), answers.readline()) == (b"HTTP/1.1 100 Continue\r\n", b"\r\n")
        client.sendall(body)
        assert answers.readline() == b"HTTP/1.1 200 OK\r\n"
    with server.raw_socket() as client, client.makefile("rb") as answers:
        client.sendall(f"{head}20001\r\n\r\n".encode())
        assert answers.readline().startswith(b"HTTP/1.1 413 ")


# --- the store and its server ----------------------------------------------------------------------------------------


def test_views(server: Server) -> None:
    answer = server.ask("GET", "/v1/views")
    assert [view["name"] for view in answer.json["views"]] == ["items", "pairs", "recent", "users"]
    assert answer.json["version"] == answer.version
    recent = answer.json["views"][2]
    assert recent["join_keys"] == [{"name": "recent_id", "type": "string"}]
    assert recent["features"] == [{"name": "clicks", "type": "int64"}, {"name": "rate", "type": "float32"}]
    assert recent["ttl_seconds"] == 3600
    assert answer.json["services"] == [
        {"name": "numbers", "features": ["items:vector", "recent:*", "items:single"]},
        {"name": "ranking", "features": ["items:single", "users:*"]},
    ]


def test_status(server: Server) -> None:
    document = server.ask("GET", "/v1/status").json
    users = next(view for view in document["views"] if view["name"] == "users")
    assert users["rows"] == users["base"]["rows"] == 10
    assert users["overlays"] == []
    assert users["applied_seq"] == 1
    assert users["watermark"] == "2026-01-01T00:00:00Z"
    age = (datetime.now(UTC) - stores.NOW) / timedelta(seconds=1)
    assert users["freshness_seconds"] == pytest.approx(age, abs=60)
    assert (users["pinned"], users["trouble"]) == (False, None)
    assert document["server"]["address"] == server.record.address
    roles = [process["role"] for process in document["server"]["processes"]]
    assert roles == ["supervisor", "writer", "worker", "worker"]


def test_health_and_readiness(server: Server) -> None:
    assert server.ask("GET", "/health").json == {"status": "alive"}
    answer = server.ask("GET", "/ready")
    assert answer.json == {"status": "ready", "version": answer.version}


def test_every_answer_names_the_version(server: Server) -> None:
    for path in ("/health", "/ready", "/metrics", "/v1/views", "/v1/status", "/nope"):
        assert server.ask("GET", path).version > 0
    assert server.ask("POST", "/get-online-features", {}).version > 0
    assert server.ask("POST", "/v1/reload", {"view": 1}).version > 0


def test_reload_by_the_writer(server: Server) -> None:
    answer = server.ask("POST", "/v1/reload", {"view": "users"})
    assert answer.status == 200
    assert [view["view"] for view in answer.json["views"]] == ["users"]
    answer = server.ask("POST", "/v1/reload", {"view": "nope"})
    assert (answer.status, answer.error[0]) == (404, "NotPublished")
    assert "'nope'" in answer.error[1]


def test_metrics_of_all_workers(server: Server) -> None:
    before = samples(server)
    threads = [threading.Thread(target=server.lookup, args=(["users:*"], {"users_id": [1, 99]})) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    server.lookup(["nope:*"], USER)
    server.ask("GET", "/some/path")
    after = samples(server)

    def rise(name: str, **labels: str) -> float:
        key = (name, frozenset(labels.items()))
        return after[key] - before.get(key, 0)

    count = "shoal_request_duration_seconds_count"
    assert rise(count, endpoint="/v1/lookup", status="200") == 20
    assert rise(count, endpoint="/v1/lookup", status="404") == 1
    assert rise(count, endpoint="other", status="404") == 1
    assert rise("shoal_lookup_keys_total") == 40
    assert rise("shoal_lookup_values_total", view="users", status="PRESENT") == 40
    assert rise("shoal_lookup_values_total", view="users", status="NOT_FOUND") == 40
    of_users = frozenset({("view", "users")})
    assert after["shoal_view_rows", of_users] == 10
    assert after["shoal_view_applied_seq", of_users] == 1
    assert after["shoal_view_overlays", of_users] == after["shoal_view_trouble", of_users] == 0
    assert after["shoal_view_pinned", of_users] == 0
    assert after["shoal_view_freshness_seconds", of_users] > 0
    assert after["shoal_view_apply_age_seconds", of_users] > 0
    versions = {after["shoal_worker_version", frozenset({("pid", str(pid))})] for pid in server.record.workers}
    eventually(lambda: samples(server)["shoal_store_version", frozenset()] >= max(versions), "the store's version")


def test_metrics_by_status(server: Server) -> None:
    before = samples(server)
    server.lookup(["recent:*"], {"recent_id": ["fresh", "stale", "stale-null", "none"]}, stale="serve")
    server.lookup(["items:flag", "items:text"], {"items_id": ["nulls", "empties"]})
    after = samples(server)
    counted = {
        (view, status): after[key] - before.get(key, 0)
        for key in after
        if key[0] == "shoal_lookup_values_total"
        for view, status in [(dict(key[1])["view"], dict(key[1])["status"])]
        if view != "users"
    }
    assert {key: count for key, count in counted.items() if count} == {
        ("recent", "PRESENT"): 2,
        ("recent", "OUTSIDE_MAX_AGE"): 4,
        ("recent", "NOT_FOUND"): 2,
        ("items", "PRESENT"): 2,
        ("items", "NULL_VALUE"): 2,
    }


def samples(server: Server) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    answer = server.ask("GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    families = text_string_to_metric_families(answer.body.decode())
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }
