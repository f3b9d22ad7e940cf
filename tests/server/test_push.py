"""Direct writes over HTTP: every worker serves an acknowledged row, and the row is durable."""

import base64
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from shoal.engine.root.export_root import ExportRoot
from tests import stores
from tests.server.serving import Answer, Server, eventually

VIEW = stores.schema("doc", key="int64", clicks="int64", score="float32", title="string", raw="bytes", seen="timestamp")
PUSHED_BY_FEAST = stores.schema("trip", a="int32", at="timestamp", f="float64").model_copy(
    update={"push_source": "trips", "timestamp_field": "happened"}
)
AS_JSON = {"Content-Type": "application/json"}
NOW = datetime.now(UTC).replace(microsecond=0)


def at(seconds: int) -> str:
    return (NOW + timedelta(seconds=seconds)).isoformat()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> ExportRoot:
    root = ExportRoot(tmp_path_factory.mktemp("push") / "root")
    old = NOW - timedelta(days=2)
    stores.publish_snapshot(
        root, VIEW, [{"doc_id": n, "clicks": n, "title": f"doc {n}", stores.TIMESTAMP: old} for n in range(100)]
    )
    stores.publish_snapshot(root, PUSHED_BY_FEAST, [{"trip_id": "x", "a": 1}])
    return root


@pytest.fixture(scope="module")
def server(root: ExportRoot) -> Iterator[Server]:
    with Server(Path(str(root)).parent / "store", {"root": str(root)}, max_keys=2000) as server:
        server.await_views(VIEW.name, PUSHED_BY_FEAST.name)
        yield server


def push(server: Server, rows: Any = None, *, deletes: Any = None, view: str = "doc", **headers: str) -> Answer:
    body = {"view": view} | ({"rows": rows} if rows is not None else {}) | ({"deletes": deletes} if deletes else {})
    return server.ask("POST", "/v1/push", body, **headers)


def seen(server: Server, *keys: int) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = server.lookup(["doc:*"], {"doc_id": list(keys)}).json["features"]
    return found


def test_rows_are_there_once_they_are_acknowledged(server: Server) -> None:
    answer = push(
        server,
        {
            "doc_id": [1, 1000],
            "event_timestamp": [at(0), at(0)],
            "clicks": [7, 8],
            "score": [0.5, None],
            "title": ["new", "ü"],
            "raw": [base64.b64encode(b"\0\xff").decode(), None],
            "seen": [at(-5), None],
        },
    )
    assert answer.status == 200
    assert answer.json == {"rows": 2, "superseded": 0, "version": answer.version}
    # Each lookup uses a new connection, so that each worker gets some of them.
    for _ in range(20):
        result = server.lookup(["doc:*"], {"doc_id": [1, 1000]})
        assert result.version >= answer.version
        assert result.json["features"]["doc:clicks"] == [7, 8]
        assert result.json["features"]["doc:title"] == ["new", "ü"]
        assert result.json["features"]["doc:raw"] == ["AP8=", None]
        assert result.json["features"]["doc:score"] == [0.5, None]


def test_features_that_a_push_lacks_stay(server: Server) -> None:
    assert push(server, {"doc_id": [2], "event_timestamp": [at(0)], "score": [1.5]}).status == 200
    assert push(server, {"doc_id": [2], "event_timestamp": [at(1)], "title": [None]}).status == 200
    found = seen(server, 2)
    assert (found["doc:clicks"], found["doc:score"], found["doc:title"]) == ([2], [1.5], [None])


def test_an_older_row_never_hides_a_newer_one(server: Server) -> None:
    assert push(server, {"doc_id": [3], "event_timestamp": [at(10)], "clicks": [10]}).json["superseded"] == 0
    assert push(server, {"doc_id": [3], "event_timestamp": [at(9)], "clicks": [9]}).json["superseded"] == 1
    assert seen(server, 3)["doc:clicks"] == [10]


def test_rows_without_an_event_time_are_of_now(server: Server) -> None:
    before = datetime.now(UTC)
    assert push(server, {"doc_id": [4], "clicks": [4]}).status == 200
    (time_of_row,) = server.lookup(["doc:clicks"], {"doc_id": [4]}).json["event_timestamps"]["doc"]
    assert before <= datetime.fromisoformat(time_of_row) <= datetime.now(UTC)


def test_deletions_hide_rows_until_newer_ones_come(server: Server) -> None:
    push(server, deletes={"doc_id": [5], "event_timestamp": [at(0)]})
    assert server.lookup(["doc:clicks"], {"doc_id": [5]}).json["status"]["doc"] == ["NOT_FOUND"]
    assert push(server, {"doc_id": [5], "event_timestamp": [at(-1)], "clicks": [1]}).json["superseded"] == 1
    push(server, {"doc_id": [5], "event_timestamp": [at(1)], "clicks": [1]})
    found = seen(server, 5)
    assert (found["doc:clicks"], found["doc:title"]) == ([1], [None])


def test_a_push_with_the_id_of_an_earlier_one_is_not_applied_again(server: Server) -> None:
    first = push(server, {"doc_id": [6], "event_timestamp": [at(0)], "clicks": [1]}, **{"Idempotency-Key": "six"})
    push(server, {"doc_id": [6], "event_timestamp": [at(0)], "clicks": [2]})
    again = push(server, {"doc_id": [6], "event_timestamp": [at(0)], "clicks": [1]}, **{"Idempotency-Key": "six"})
    assert first.json["rows"] == again.json["rows"] == 1
    assert seen(server, 6)["doc:clicks"] == [2]


def keyed(server: Server, key: str, body: Any, path: str = "/v1/push", **headers: str) -> tuple[int, str]:
    """Return the status of a push with an idempotency key, and the error code if /v1/push refused it."""
    answer = server.ask("POST", path, body, **{"Idempotency-Key": key}, **headers)
    return answer.status, answer.error[0] if answer.status != 200 and path == "/v1/push" else ""


REUSED = (422, "IdempotencyKeyReused")


def test_an_id_with_other_content_is_refused_and_changes_nothing(server: Server) -> None:
    first = {"view": "doc", "rows": {"doc_id": [70], "clicks": [1]}}
    assert keyed(server, "reused", first) == (200, "")
    for other in (
        {"view": "doc", "rows": {"doc_id": [70], "clicks": [2]}},
        {"view": "doc", "rows": {"doc_id": [70, 71], "clicks": [1, 1]}},
        {"view": "doc", "rows": {"doc_id": [70], "clicks": [1], "event_timestamp": [at(0)]}},
        {"view": "doc", "deletes": {"doc_id": [70]}},
        first | {"deletes": {"doc_id": [71]}},
    ):
        assert keyed(server, "reused", other) == REUSED
    assert seen(server, 70, 71)["doc:clicks"] == [1, 71]
    # The same content without an event time is recognized, although the time of the push is later.
    assert keyed(server, "reused", first) == (200, "")
    assert keyed(server, "reused", json.dumps(first, indent=3).encode()) == (200, "")
    body = b'{"rows": {"clicks": [1], "doc_id": [70]}, "view": "d\\u006fc"}'
    assert keyed(server, "reused", body) == (200, "")


def test_an_id_belongs_to_one_view_and_to_all_endpoints(server: Server) -> None:
    frame = {"trip_id": ["k"], "a": [5], "at": [1_700_000_000], "f": [None], "happened": [at(0)]}
    write = {"feature_view_name": "trip", "df": frame}
    source = {"push_source_name": "trips", "df": frame}
    assert keyed(server, "both", {"view": "doc", "rows": {"doc_id": [72], "clicks": [1]}}) == (200, "")
    assert keyed(server, "both", write, "/write-to-online-store", **AS_JSON)[0] == 200
    assert keyed(server, "both", write, "/write-to-online-store", **AS_JSON)[0] == 200
    with_nan = json.dumps(write).replace("null", "NaN").encode()
    assert keyed(server, "nan", with_nan, "/write-to-online-store", **AS_JSON)[0] == 200
    assert keyed(server, "nan", with_nan, "/write-to-online-store", **AS_JSON)[0] == 200
    assert keyed(server, "both", source, "/push", **AS_JSON)[0] == 422
    frame["a"] = [6]
    assert keyed(server, "both", write, "/write-to-online-store", **AS_JSON)[0] == 422
    rows = {"trip_id": ["k"], "a": [6]}
    assert keyed(server, "both", {"view": "trip", "rows": rows}) == REUSED
    asked = {"features": ["trip:a"], "entities": {"trip_id": ["k"]}}
    assert server.ask("POST", "/get-online-features", asked).json["results"][1]["values"] == [5]


def test_an_id_with_other_content_is_refused_in_arrow_too(server: Server) -> None:
    def body(clicks: int) -> bytes:
        table = pa.table({"doc_id": [73], "clicks": [clicks]})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        return bytes(sink.getvalue())

    headers = {"Content-Type": "application/vnd.apache.arrow.stream", "Idempotency-Key": "arrow"}
    statuses = [server.ask("POST", "/v1/push?view=doc", body(n), **headers).status for n in (1, 1, 2)]
    assert statuses == [200, 200, 422]
    assert keyed(server, "arrow", {"view": "doc", "rows": {"doc_id": [73], "clicks": [1]}}) == REUSED
    assert seen(server, 73)["doc:clicks"] == [1]


def test_event_times_that_a_client_added_are_no_content(server: Server) -> None:
    def body(seconds: int, clicks: int) -> dict[str, Any]:
        return {"view": "doc", "rows": {"doc_id": [76], "clicks": [clicks], "event_timestamp": [at(seconds)]}}

    stamped = {"X-Shoal-Stamped": "rows"}
    assert keyed(server, "stamped", body(0, 1), **stamped) == (200, "")
    assert keyed(server, "stamped", body(1, 1), **stamped) == (200, "")
    assert keyed(server, "stamped", body(1, 2), **stamped) == REUSED
    assert keyed(server, "stamped", body(0, 1)) == REUSED
    assert keyed(server, "stamped", body(0, 1), **{"X-Shoal-Stamped": "columns"})[0] == 400
    assert seen(server, 76)["doc:clicks"] == [1]


def test_an_id_of_a_push_that_failed_may_be_used_again(server: Server) -> None:
    assert keyed(server, "failed", {"view": "doc", "rows": {"doc_id": [74], "clicks": ["x"]}})[0] == 400
    assert keyed(server, "failed", {"view": "doc", "rows": {"doc_id": [74], "clicks": [4]}}) == (200, "")
    assert seen(server, 74)["doc:clicks"] == [4]


def test_of_pushes_that_race_under_one_id_one_is_applied(server: Server) -> None:
    answers: list[tuple[int, int]] = []

    def work(clicks: int) -> None:
        with server.connection() as connection:
            body = {"view": "doc", "rows": {"doc_id": [75], "clicks": [clicks]}}
            answers.append((clicks, connection.ask("POST", "/v1/push", body, **{"Idempotency-Key": "race"}).status))

    threads = [threading.Thread(target=work, args=(number % 4,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (won,) = seen(server, 75)["doc:clicks"]
    assert sorted(answers) == sorted((number % 4, 200 if number % 4 == won else 422) for number in range(16))


def test_rows_in_arrow(server: Server) -> None:
    table = pa.table({"doc_id": [7, 8], "score": pa.array([7, 8], pa.float32()), "event_timestamp": [NOW, NOW]})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    headers = {"Content-Type": "application/vnd.apache.arrow.stream"}
    body = bytes(sink.getvalue())
    assert server.ask("POST", "/v1/push?view=doc", body, **headers).json["rows"] == 2
    assert seen(server, 7, 8)["doc:score"] == [7.0, 8.0]
    assert server.ask("POST", "/v1/push", body, **headers).error[1].startswith("a push in Arrow does not name its view")
    assert server.ask("POST", "/v1/push?view=doc", body[:99], **headers).status == 400


def test_a_column_that_stands_twice_is_refused_and_a_text_that_looks_like_one_is_not(server: Server) -> None:
    body = b'{"view": "doc", "rows": {"doc_id": [21], "clicks": [1], "clicks": [2]}}'
    answer = server.ask("POST", "/v1/push", body)
    assert (answer.status, answer.error[1]) == (400, "'clicks' appears twice in an object of the body; give it once")
    text = '{"clicks": 1, "clicks": 2}'
    answer = server.ask("POST", "/v1/push", {"view": "doc", "rows": {"doc_id": [21], "title": [text]}})
    assert answer.status == 200
    assert seen(server, 21)["doc:title"] == [text]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"view": "nope", "rows": {"doc_id": [1]}}, 404, "no view 'nope'"),
        ({"view": "doc"}, 400, "give rows, deletes or both"),
        ({"view": "doc", "rows": {"doc_id": [1]}}, 400, "holds no feature"),
        ({"view": "doc", "rows": {"clicks": [1]}}, 400, "lacks its join key 'doc_id'"),
        ({"view": "doc", "rows": {"doc_id": [1], "klicks": [1]}}, 400, "has no column 'klicks'"),
        ({"view": "doc", "rows": {"doc_id": [1, 2], "clicks": [1]}}, 400, "'clicks' has 1 values, but 'doc_id' has 2"),
        ({"view": "doc", "rows": {"doc_id": [None], "clicks": [1]}}, 400, "is null in row 0"),
        ({"view": "doc", "rows": {"doc_id": ["1"], "clicks": [1]}}, 400, "must be int64"),
        ({"view": "doc", "rows": {"doc_id": [1], "clicks": [1.5]}}, 400, "'clicks' must be int64"),
        ({"view": "doc", "rows": {"doc_id": [1], "clicks": [True]}}, 400, "'clicks' must be int64"),
        ({"view": "doc", "rows": {"doc_id": [1], "score": [1e300]}}, 400, "'score' must be float32"),
        ({"view": "doc", "rows": {"doc_id": [1], "title": [5]}}, 400, "'title' must be string"),
        ({"view": "doc", "rows": {"doc_id": [1], "title": [["x"]]}}, 400, "'title' must be string"),
        ({"view": "doc", "rows": {"doc_id": [1], "raw": ["%"]}}, 400, "must be bytes in base64"),
        ({"view": "doc", "rows": {"doc_id": [1], "seen": [5]}}, 400, "give timestamps in ISO 8601"),
        ({"view": "doc", "rows": {"doc_id": [1], "clicks": [1], "event_timestamp": ["now"]}}, 400, "holds 'now'"),
        ({"view": "doc", "rows": {"doc_id": [1], "clicks": [1], "event_timestamp": [None]}}, 400, "null in row 0"),
        ({"view": "doc", "rows": {"doc_id": [1], "clicks": [1], "event_timestamp": ["5000-01-01"]}}, 400, "the future"),
        ({"view": "doc", "deletes": {"doc_id": [1], "clicks": [1]}}, 400, "'clicks' is not a join key"),
        ({"view": "doc", "rows": {"doc_id": list(range(3000)), "clicks": [1] * 3000}}, 413, "3000 rows"),
        ({"view": "doc", "rows": {"doc_id": 1, "clicks": 1}}, 400, "rows.doc_id"),
        ({"view": 5, "rows": {}}, 400, "view is 5"),
    ],
)
def test_rows_that_do_not_fit_are_refused(server: Server, body: Any, status: int, message: str) -> None:
    answer = server.ask("POST", "/v1/push", body)
    assert answer.status == status
    assert message in answer.error[1]


def test_times_outside_the_range_fail_their_push_and_nothing_else(server: Server) -> None:
    outside = {"event_timestamp": "0001-01-01T00:00:00+14:00", "seen": "9999-12-31T23:59:59-14:00"}
    answers: dict[int, int] = {}

    def work(place: int) -> None:
        with server.connection() as connection:
            for number in range(20):
                key = 5000 + place * 20 + number
                rows: dict[str, list[Any]] = {"doc_id": [key, 9000 + key], "clicks": [number] * 2}
                if number % 4 == 0:
                    (name, time), good = [*outside.items()][number % 8 // 4], at(0)
                    rows |= {name: [good, time]}
                answer = connection.ask("POST", "/v1/push", {"view": "doc", "rows": rows})
                answers[key] = answer.status
                if answer.status != 200:
                    assert f"column '{name}' holds " in answer.error[1]
                    assert " in row 1; give times in the years 1 to 9999" in answer.error[1]

    threads = [threading.Thread(target=work, args=(place,)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {key: 400 if key % 4 == 0 else 200 for key in range(5000, 5160)}
    # A push is applied completely or not at all, and every key can be looked up.
    assert seen(server, *range(5000, 5160))["doc:clicks"] == [
        None if key % 4 == 0 else (key - 5000) % 20 for key in range(5000, 5160)
    ]


def test_a_push_is_acknowledged_to_a_client_that_sends_no_more(server: Server) -> None:
    row = {"trip_id": ["y"], "a": [1], "at": [at(0)], "f": [0.5], "happened": [at(0)]}
    for path, body in (
        ("/v1/push", {"view": "doc", "rows": {"doc_id": [77], "clicks": [78]}}),
        ("/push", {"push_source_name": "trips", "df": row}),
    ):
        content = json.dumps(body).encode()
        with server.raw_socket() as client:
            head = f"POST {path} HTTP/1.1\r\nHost: shoal\r\nContent-Type: application/json\r\nContent-Length: "
            client.sendall(f"{head}{len(content)}\r\n\r\n".encode() + content)
            client.shutdown(socket.SHUT_WR)
            assert client.makefile("rb").read().startswith(b"HTTP/1.1 200 OK")
    assert seen(server, 77)["doc:clicks"] == [78]


def test_an_empty_push_is_no_error(server: Server) -> None:
    assert push(server, {"doc_id": [], "clicks": []}).json["rows"] == 0


def test_pushes_side_by_side_all_arrive(server: Server) -> None:
    def work(place: int) -> None:
        with server.connection() as connection:
            for number in range(20):
                rows = {"doc_id": [2000 + place * 20 + number], "clicks": [number]}
                assert connection.ask("POST", "/v1/push", {"view": "doc", "rows": rows}).status == 200

    threads = [threading.Thread(target=work, args=(place,)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen(server, *range(2000, 2160))["doc:clicks"] == list(range(20)) * 8


def test_pushes_outlive_a_snapshot_where_they_are_newer(server: Server, root: ExportRoot) -> None:
    push(server, {"doc_id": [50, 51], "event_timestamp": [at(0), at(-1000)], "clicks": [500, 510]})
    rows = [{"doc_id": n, "clicks": -n, stores.TIMESTAMP: NOW - timedelta(seconds=100)} for n in range(100)]
    stores.publish_snapshot(root, VIEW, rows)
    eventually(lambda: seen(server, 99)["doc:clicks"] == [-99], "the snapshot")
    assert seen(server, 50, 51)["doc:clicks"] == [500, -51]


def test_an_acknowledged_push_outlives_the_death_of_the_writer_and_the_next_waits_for_a_new_one(server: Server) -> None:
    for number in range(5):
        assert push(server, {"doc_id": [60], "event_timestamp": [at(number)], "clicks": [number]}).status == 200
        writer = server.record.writer
        assert writer
        os.kill(writer, signal.SIGKILL)
        assert seen(server, 60)["doc:clicks"] == [number]
        assert push(server, {"doc_id": [61], "clicks": [number]}).status == 200
        assert seen(server, 61)["doc:clicks"] == [number]


# --- Feast's clients -----------------------------------------------------------------------------------------------


def test_feast_pushes_by_source_and_writes_by_view(server: Server) -> None:
    frame = {"trip_id": ["a"], "a": [5], "at": [1_700_000_000], "f": [0.5], "happened": [at(0)], "more": [1]}
    answer = server.ask("POST", "/push", {"push_source_name": "trips", "df": frame}, **AS_JSON)
    assert (answer.status, answer.body) == (200, b"")
    frame = {"trip_id": ["b"], "a": [6], "at": [None], "f": [None], "event_timestamp": [at(0)], "created": [None]}
    body = json.dumps({"feature_view_name": "trip", "df": frame}).replace("null", "NaN", 1).encode()
    answer = server.ask("POST", "/write-to-online-store", body, **AS_JSON)
    assert (answer.status, answer.json) == (200, None)
    asked = {"features": ["trip:a", "trip:at", "trip:f"], "entities": {"trip_id": ["a", "b"]}}
    found = server.ask("POST", "/get-online-features", asked).json
    assert [result["values"] for result in found["results"]] == [["a", "b"], [5, 6], [1_700_000_000, None], [0.5, None]]


@pytest.mark.parametrize(
    ("column", "number", "message"),
    [
        ("at", 10**15, "column 'at' holds 1000000000000000000000 microseconds since 1970 in row 1; give times in"),
        ("at", 253_402_300_800, "column 'at' holds 10000-01-01T00:00:00.000000Z in row 1"),
        ("at", -62_135_596_801, "column 'at' holds 0000-12-31T23:59:59.000000Z in row 1"),
        ("at", 2**63, "column 'at' must be timestamps"),
        ("happened", 2**63 - 1, "more than a day in the future"),
        ("happened", -(2**63), "is null in row 1"),
    ],
)
def test_feast_numbers_that_are_no_time_are_refused(server: Server, column: str, number: int, message: str) -> None:
    frame = {"trip_id": ["no", "no"], "a": [1, 1], "at": [0, 0], "f": [0.5, 0.5], "happened": [1, 1]}
    frame |= {column: [1, number]}
    answer = server.ask("POST", "/push", {"push_source_name": "trips", "df": frame}, **AS_JSON)
    assert answer.status == 400
    assert message in json.loads(answer.json)["message"]
    asked = {"features": ["trip:a"], "entities": {"trip_id": ["no"]}}
    assert server.ask("POST", "/get-online-features", asked).json["results"][1]["statuses"] == ["NOT_FOUND"]


def test_feasts_number_for_no_time_is_null(server: Server) -> None:
    frame = {"trip_id": ["n"], "a": [1], "at": [-(2**63)], "f": [0.5], "happened": [at(0)]}
    assert server.ask("POST", "/push", {"push_source_name": "trips", "df": frame}, **AS_JSON).status == 200
    asked = {"features": ["trip:at"], "entities": {"trip_id": ["n"]}}
    (_, found) = server.ask("POST", "/get-online-features", asked).json["results"]
    assert (found["values"], found["statuses"]) == ([None], ["NULL_VALUE"])


@pytest.mark.parametrize(
    ("path", "body", "status", "exception"),
    [
        ("/push", {"push_source_name": "nope", "df": {}}, 422, "PushSourceNotFoundException"),
        ("/push", {"push_source_name": "trips", "df": {"trip_id": ["a"]}}, 400, "FeastError"),
        ("/push", {"push_source_name": "trips", "df": {}, "to": "offline"}, 400, "FeastError"),
        ("/write-to-online-store", {"feature_view_name": "no", "df": {}}, 404, "FeastObjectNotFoundException"),
        ("/materialize", {}, 501, "FeastError"),
    ],
)
def test_feast_is_told_in_its_own_way(server: Server, path: str, body: Any, status: int, exception: str) -> None:
    answer = server.ask("POST", path, body, **AS_JSON)
    assert answer.status == status
    assert json.loads(answer.json)["class"] == exception
