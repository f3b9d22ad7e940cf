"""A server with views on the node and views in tables: one request can use both, and the answer names the views with
rows that a table did not deliver in time."""

import base64
import io
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pytest

from shoal import FeatureStore
from shoal.client import Client, errors
from shoal.engine.dynamodb.breaker import FAILURES
from shoal.engine.format.schema import FeatureService
from shoal.engine.root.export_root import ExportRoot
from tests import stores
from tests.dynamodb.tables import ENDPOINT, remote, shoal, sync
from tests.faulty_network import FaultyNetwork, faulty_network
from tests.server.feast_messages import decode
from tests.server.grpc_client import as_sent, asked, client_of, integers
from tests.server.serving import Answer, Server, eventually

HERE = stores.schema("here", key="int64", a="int64", text="string", score="float32")
COUNT = 250
ROWS: list[stores.Row] = [
    {"here_id": n, "a": n, "text": None if n % 7 == 0 else f"t{n}", "score": n / 4} for n in range(COUNT)
]
KEYS = [*range(0, COUNT, 2), 100_000, 0, 2]
"""Many keys that exist, one that does not, and two that occur twice."""
PATIENT = {"X-Request-Timeout-Ms": "20000"}
ARROW, NPY = "application/vnd.apache.arrow.stream", "application/x-npy"


@pytest.fixture(scope="module")
def network(endpoint: str) -> Iterator[FaultyNetwork]:
    with faulty_network(endpoint) as network, pytest.MonkeyPatch.context() as environment:
        environment.setenv(ENDPOINT, network.url)
        yield network


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, endpoint: str) -> ExportRoot:
    """The same rows on the node and in two tables."""
    root = ExportRoot(tmp_path_factory.mktemp("root"))
    stores.publish_snapshot(root, HERE, ROWS)
    for name in ("there", "far"):
        stores.publish_snapshot(root, remote(HERE.model_copy(update={"name": name}), f"serving.{name}"), ROWS)
    root.publish_services((FeatureService(name="mixed", features=("here:*", "there:*", "far:a")),))
    sync(root)
    return root


@pytest.fixture(scope="module")
def server(root: ExportRoot, network: FaultyNetwork, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    store = tmp_path_factory.mktemp("served") / "store"
    settings: dict[str, Any] = {"workers": 1, "grpc_port": 0, "remote_cache_seconds": 0}
    with Server(store, {"root": str(root)}, **settings) as server:
        server.await_views("here", "there", "far")
        eventually(lambda: "x-shoal-partial" not in lookup(server).headers, "a server that has found the tables")
        yield server


@pytest.fixture(autouse=True)
def mended(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "network" in request.fixturenames:
        request.getfixturevalue("network").mend()
        # After a table has failed to answer for a long time, the server does not ask it for a while.
        server = request.getfixturevalue("server")
        eventually(lambda: "x-shoal-partial" not in lookup(server).headers, "whole answers")


def lookup(server: Server, accept: str = "application/json", service: str = "mixed", **headers: str) -> Answer:
    body = {"service": service, "entities": {"here_id": KEYS}}
    return server.ask("POST", "/v1/lookup", body, Accept=accept, **(PATIENT | headers))


def of_view(document: dict[str, Any], view: str) -> list[Any]:
    features = [values for name, values in sorted(document["features"].items()) if name.startswith(f"{view}:")]
    return [*features, document["status"][view], document["event_timestamps"][view]]


def feast(server: Server, **headers: str) -> Answer:
    body = {"features": ["here:a", "far:text", "there:score"], "entities": {"here_id": KEYS}}
    return server.ask("POST", "/get-online-features", body | {"full_feature_names": True}, **(PATIENT | headers))


def grpc_request() -> bytes:
    return as_sent(asked(["here:score", "there:a", "far:text"], {"here_id": integers(*KEYS)}, full_feature_names=True))


def test_views_on_the_node_and_in_tables_are_mixed_in_one_request(server: Server) -> None:
    answer = lookup(server)
    document = answer.json
    assert (answer.status, document["keys"]) == (200, len(KEYS))
    assert of_view(document, "there") == of_view(document, "here")
    assert document["features"]["far:a"] == document["features"]["here:a"]
    assert document["status"]["far"] == ["PRESENT" if key < COUNT else "NOT_FOUND" for key in KEYS]

    table = pa.ipc.open_stream(lookup(server, ARROW).body).read_all()
    for name in ("a", "text", "score"):
        assert table.column(f"there:{name}").equals(table.column(f"here:{name}"))
    assert table.column("far:a").to_pylist() == [key if key < COUNT else None for key in KEYS]

    body = {"features": ["here:a", "far:score", "there:a", "here:score"], "entities": {"here_id": KEYS}}
    matrix = np.load(io.BytesIO(server.ask("POST", "/v1/lookup", body, Accept=NPY, **PATIENT).body))
    np.testing.assert_array_equal(matrix[:, :2], matrix[:, 2:])
    assert matrix[:3].tolist() == [[0, 0, 0, 0], [2, 0.5, 2, 0.5], [4, 1, 4, 1]]

    results = feast(server).json["results"]
    assert [value["values"][:2] for value in results] == [[0, 2], [0, 2], [None, "t2"], [0.0, 0.5]]
    assert results[2]["statuses"][:2] == ["NULL_VALUE", "PRESENT"]
    assert len({orjson.dumps(result["event_timestamps"]) for result in results[1:]}) == 1
    lenient = {"features": ["here@latest:a", "far@latest:a"], "entities": {"here_id": ["2", "4"]}}
    values = server.ask("POST", "/get-online-features", lenient | {"full_feature_names": True}, **PATIENT).json
    assert [value["values"] for value in values["results"][1:]] == [[2, 4], [2, 4]]

    with client_of(server) as client:
        found = decode("GetOnlineFeaturesResponse", client.call(grpc_request())[0])["results"]
    assert found[1]["values"][1] == {"float_val": 0.5}
    assert found[2]["values"][1] in ({"int64_val": "2"}, {"int64_val": 2})
    assert found[3]["values"][1] == {"string_val": "t2"}
    assert found[1]["statuses"] == found[2]["statuses"]


def test_rows_that_do_not_come_in_time_are_marked_and_the_others_served(server: Server, network: FaultyNetwork) -> None:
    network.fail(method="POST", text="serving.far", late=30.0, times=float("inf"))
    started = time.monotonic()
    answer = lookup(server, **{"X-Request-Timeout-Ms": "700"})
    assert time.monotonic() - started < 0.7
    assert (answer.status, answer.headers["x-shoal-partial"]) == (200, "far"), answer.body
    document = answer.json
    assert set(document["status"]["far"]) == {"UNAVAILABLE"}
    assert (set(document["features"]["far:a"]), set(document["event_timestamps"]["far"])) == ({None}, {None})
    assert of_view(document, "there") == of_view(document, "here")

    soon = {"X-Request-Timeout-Ms": "700"}
    answer = lookup(server, ARROW, **soon)
    assert answer.headers["x-shoal-partial"] == "far"
    assert pa.ipc.open_stream(answer.body).read_all().column("far:a").null_count == len(KEYS)
    body = {"features": ["here:a", "far:a"], "entities": {"here_id": KEYS}}
    answer = server.ask("POST", "/v1/lookup", body, Accept=NPY, **soon)
    assert answer.headers["x-shoal-partial"] == "far"
    assert np.isnan(np.load(io.BytesIO(answer.body))).sum(axis=0).tolist() == [1, len(KEYS)]
    answer = feast(server, **soon)
    assert (answer.status, answer.headers["x-shoal-partial"]) == (200, "far")
    assert set(answer.json["results"][2]["statuses"]) == {"UNAVAILABLE"}
    with client_of(server) as client:
        call = client.channel.unary_unary("/feast.serving.ServingService/GetOnlineFeatures")
        content, state = call.with_call(grpc_request(), timeout=0.7)
    assert dict(state.trailing_metadata())["x-shoal-partial"] == "far"
    results = decode("GetOnlineFeaturesResponse", content)["results"]
    assert set(results[3]["statuses"]) == {"INVALID"}
    # With this header, the client gets all rows or an error.
    answer = lookup(server, **soon, **{"X-Shoal-Partial": "fail"})
    assert (answer.status, answer.error[0]) == (503, "RowsUnavailable"), answer.body
    answer = lookup(server, **{"X-Shoal-Partial": "maybe"})
    assert (answer.status, answer.error[0]) == (400, "LookupInvalid")
    with Client(server.record.address) as asking:
        mixed = asking.lookup(["far:a", "here:a"], {"here_id": KEYS}, timeout=0.7)
        assert (mixed.partial, mixed.to_arrow().column("far:a").null_count) == (("far",), len(KEYS))
        with pytest.raises(errors.RowsUnavailable):
            asking.lookup(["far:a"], {"here_id": KEYS}, timeout=0.7, partial="fail")
    # If a client does not say how long it waits, the server waits as long as the setting says.
    answer = server.ask("POST", "/v1/lookup", {"service": "mixed", "entities": {"here_id": [1]}})
    assert (answer.headers["x-shoal-partial"].split(",")[-1], answer.status) == ("far", 200)
    metrics = server.ask("GET", "/metrics").body.decode()
    assert 'shoal_partial_answers_total{view="far"} ' in metrics
    assert 'shoal_remote_keys_total{outcome="unavailable",view="far"} ' in metrics
    assert 'shoal_lookup_values_total{status="UNAVAILABLE",view="far"} ' in metrics


def test_a_table_that_does_not_answer_is_left_alone_for_a_while(server: Server, network: FaultyNetwork) -> None:
    dead = network.fail(method="POST", text="serving.far", late=30.0, times=1e9)
    for _ in range(FAILURES):
        assert lookup(server, **{"X-Request-Timeout-Ms": "200"}).headers["x-shoal-partial"] == "far"
    eventually(lambda: "table 'serving.far' does not answer" in server.log, "a line of the log")
    sent = dead.met
    for _ in range(100):
        answer = lookup(server, **{"X-Request-Timeout-Ms": "200"})
        assert answer.headers["x-shoal-partial"] == "far"
        assert of_view(answer.json, "there") == of_view(answer.json, "here")
    # One request at a time tries the table, and no other request waits for it.
    assert dead.met - sent < 20
    network.mend()
    eventually(lambda: "x-shoal-partial" not in lookup(server).headers, "rows of the table")
    eventually(lambda: "table 'serving.far' answers again" in server.log, "a line of the log")


def test_a_client_that_does_not_wait_says_nothing_of_a_table(server: Server, network: FaultyNetwork) -> None:
    network.fail(method="POST", text="serving.far", late=0.1, times=1e9)
    for _ in range(2 * FAILURES):
        lookup(server, **{"X-Request-Timeout-Ms": "15"})
    assert "x-shoal-partial" not in lookup(server).headers


def _leave_out(body: bytes, content: bytes) -> bytes:
    """Return the answer of a server that had no time for half of the keys, without the rows of these keys."""
    (table, asked), answer = next(iter(orjson.loads(body)["RequestItems"].items())), orjson.loads(content)
    left = asked["Keys"][::2]
    binary = {key["k"]["B"] for key in left}
    kept = [item for item in answer["Responses"][table] if _key(item) not in binary]
    return orjson.dumps({"Responses": {table: kept}, "UnprocessedKeys": {table: asked | {"Keys": left}}})


def _key(item: dict[str, Any]) -> str:
    return base64.b64encode(base64.b64decode(item["v"]["B"])[8:24]).decode()


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 500},
        {"status": 503, "code": "ServiceUnavailable"},
        {"status": 400, "code": "ProvisionedThroughputExceededException"},
        {"changes": _leave_out},
        {"changes": lambda body, content: content[: len(content) // 2]},
        {"cut": 0},
        {"lost": True},
        {"late": 0.2},
    ],
    ids=["500", "503", "throttled", "unprocessed", "damaged", "cut", "lost", "late"],
)
def test_what_passes_is_borne_within_the_deadline(
    server: Server, network: FaultyNetwork, fault: dict[str, Any]
) -> None:
    whole = network.fail(method="POST", text="BatchGetItem", times=5, **fault)
    answer = lookup(server)
    assert (answer.status, "x-shoal-partial" in answer.headers) == (200, False), answer.body[:500]
    assert of_view(answer.json, "there") == of_view(answer.json, "here")
    assert whole.met == 5 or "late" in fault


def test_what_does_not_pass_leaves_its_view_out_at_once(server: Server, network: FaultyNetwork) -> None:
    network.fail(method="POST", text="serving.far", times=1e9, status=400, code="AccessDeniedException")
    started = time.monotonic()
    answer = lookup(server)
    assert time.monotonic() - started < 10
    assert answer.headers["x-shoal-partial"] == "far"
    eventually(lambda: "AccessDeniedException" in server.log, "what the table says in the log")


def test_a_view_in_a_table_is_shown_as_such_and_takes_no_pushes(server: Server, root: ExportRoot) -> None:
    views = {view["name"]: view for view in server.ask("GET", "/v1/views").json["views"]}
    assert [(views[name]["tier"], views[name]["table"]) for name in ("here", "there")] == [
        ("local", None),
        ("dynamodb", "serving.there"),
    ]
    status = {view["name"]: view for view in server.ask("GET", "/v1/status").json["views"]}
    assert (status["there"]["rows"], status["there"]["applied_seq"], status["there"]["tier"]) == (0, 1, "dynamodb")
    answer = server.ask("POST", "/v1/push", {"view": "there", "rows": {"here_id": [1], "a": [1]}})
    assert (answer.status, answer.error[0]) == (409, "PushElsewhere"), answer.body
    done = shoal("status", "--store", server.store)
    assert (done.returncode, "table serving.there" in done.stdout) == (0, True), done.stdout
    done = shoal("lookup", "--store", server.store, "--features", "there:a,here:a", "--key", "here_id=8", "--json")
    assert [row["value"] for row in orjson.loads(done.stdout)["rows"]] == [8, 8]


def test_in_process_lookups_time_out_and_hedge(server: Server, network: FaultyNetwork) -> None:
    opened = FeatureStore.open(server.store, hedge_seconds=0.1)
    assert opened.lookup(["there:a"], {"here_id": [1]}).to_pydict() == {"there:a": [1]}
    slow = network.fail(method="POST", text="serving.there", late=5.0, times=1)
    started = time.monotonic()
    assert opened.lookup(["there:a"], {"here_id": [2]}, remote_timeout=4.0).to_pydict() == {"there:a": [2]}
    assert (time.monotonic() - started < 4.0, slow.met) == (True, 1)
    slow.met, slow.times = 0, 2
    assert opened.lookup(["there:a"], {"here_id": [3]}, remote_timeout=0.3).partial == ["there"]


def test_rows_are_cached_for_a_moment_also_those_that_are_not_there(
    server: Server, root: ExportRoot, network: FaultyNetwork
) -> None:
    view = remote(HERE.model_copy(update={"name": "there"}), "serving.there")
    first, second = (FeatureStore.open(server.store, cache_seconds=1.0, cache_bytes=1 << 20) for _ in range(2))

    def asked_for() -> int:
        return sum(request.endswith("BatchGetItem") for request in network.requests)

    def seen(store: FeatureStore) -> list[Any]:
        return store.lookup(["there:a"], {"here_id": [5, 777]}).to_pydict()["there:a"]

    before = asked_for()
    assert seen(first) == [5, None]
    assert asked_for() == before + 1
    eventually(lambda: (seen(second), asked_for())[1] == (seen(second), asked_for())[1], "a cache that is filled")
    filled = asked_for()
    assert [seen(store) for store in (first, second, first)] == [[5, None]] * 3
    assert asked_for() == filled
    now = datetime.now(UTC)
    stores.publish_delta(
        root, view, [{"here_id": 777, "a": 7, stores.TIMESTAMP: now}], [{"here_id": 5, stores.TIMESTAMP: now}]
    )
    sync(root, "there")
    eventually(lambda: seen(first) == [None, 7], "what changed, once the cache has forgotten")
    # These are more rows than fit. The cache starts over, and the answers stay correct.
    for start in range(0, COUNT, 50):
        keys = list(range(start, start + 50))
        for _ in range(2):
            found = first.lookup(["there:a"], {"here_id": keys}).to_pydict()["there:a"]
            assert found == [None if key == 5 else key for key in keys]
    assert {path.name for path in Path(server.store).glob("remote-cache/*/*")} == {"data.mdb", "lock.mdb"}
