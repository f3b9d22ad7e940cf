"""Feast's serving protocol over gRPC, tested on the wire."""

import json
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.serving import PATIENCE_SECONDS, Server, eventually

grpc = pytest.importorskip("grpc", reason="grpcio is not installed: pip install 'shoal[grpc]'")

from tests.server.feast_messages import decode  # noqa: E402
from tests.server.grpc_client import SERVING, Asked, Client, as_sent, asked, client_of, integers, texts  # noqa: E402

PYTHON_OF_FEAST = Path(__file__).parents[2] / ".venv-peers" / "bin" / "python"
EPOCH = "1970-01-01T00:00:00Z"
NEW_YEAR = "2026-01-01T00:00:00Z"
HARD = ["nulls", "extremes", "empties", "none"]
ITEMS = {"items_id": texts(*HARD, *(f"item-{number}" for number in range(20)))}
USER = {"users_id": integers(3)}


REQUESTS = [
    asked(["items:*"], ITEMS),
    asked(["users:score", "items:words", "items:single", "users:text"], ITEMS | {"users_id": integers(*range(24))}),
    asked("ranking", {"items_id": texts("item-1", "none"), "users_id": integers(3, 99)}, full_feature_names=True),
    asked(["users:text"], {"users_id": {"val": [{"int32_val": 3}]}}, include_feature_view_version_metadata=True),
    asked(["pairs:*"], {"items_id": texts("item-1", "item-2", "none"), "users_id": integers(0, 1, 3)}),
    asked(["pairs:*", "users:text"], {"users_id": integers(0, 1)}, full_feature_names=True),
    asked(["recent:*"], {"recent_id": texts("fresh", "stale", "stale-null", "none")}),
    asked(["users:text"], {"users_id": {"val": []}}),
]


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with client_of(server) as client:
        yield client


def test_requests_of_other_bytes_are_the_clients_fault(client: Client, server: Server) -> None:
    source = random.Random(3)
    for _ in range(int(os.environ.get("SHOAL_FUZZ_EXAMPLES", "100"))):
        request = bytearray(as_sent(source.choice(REQUESTS)))
        for _ in range(source.randrange(1, 4)):
            at = source.randrange(len(request) + 1)
            request[at : at + source.randrange(3)] = source.randbytes(source.randrange(4))
        try:
            client.call(bytes(request))
        except grpc.RpcError as error:
            if error.code().name not in ("INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED"):
                raise AssertionError(f"{error.code().name}: {bytes(request)!r}") from error
    assert "failed\nTraceback" not in server.log


def test_join_keys_come_first_then_features_in_the_order_asked(client: Client) -> None:
    entities = {"users_id": integers(3, 99), "unused": texts("x", "y"), "items_id": texts("empties", "none")}
    found = ["PRESENT", "NOT_FOUND"]
    times = [NEW_YEAR, EPOCH]
    assert client.ask(asked(["users:score", "items:large"], entities)) == {
        "metadata": {"feature_names": {"val": ["users_id", "items_id", "score", "large"]}},
        "results": [
            {
                "values": [{"int64_val": "3"}, {"int64_val": "99"}],
                "statuses": ["PRESENT"] * 2,
                "event_timestamps": [EPOCH] * 2,
            },
            {
                "values": [{"string_val": "empties"}, {"string_val": "none"}],
                "statuses": ["PRESENT"] * 2,
                "event_timestamps": [EPOCH] * 2,
            },
            {"values": [{"float_val": 0.75}, {}], "statuses": found, "event_timestamps": times},
            {"values": [{"int64_val": str(-(2**63))}, {}], "statuses": found, "event_timestamps": times},
        ],
    }


def test_keys_of_several_parts(client: Client) -> None:
    entities = {"items_id": texts("item-3", "item-2", "item-9"), "users_id": integers(1, 3, 3)}
    answer = client.ask(asked(["pairs:*"], entities))
    assert answer["metadata"]["feature_names"]["val"] == ["items_id", "users_id", "seen", "times"]
    assert [result["statuses"] for result in answer["results"][2:]] == [
        ["PRESENT", "PRESENT", "NOT_FOUND"],
        ["NULL_VALUE", "PRESENT", "NOT_FOUND"],
    ]
    assert [result["values"] for result in answer["results"][2:]] == [
        [{"bool_val": False}, {"bool_val": True}, {}],
        [{}, {"int32_val": 2}, {}],
    ]


def test_a_key_given_in_part_is_not_found(client: Client) -> None:
    """The views with complete keys are not affected."""
    answer = client.ask(asked(["pairs:times", "users:score"], {"users_id": integers(1, 3)}))
    assert answer["metadata"]["feature_names"]["val"] == ["users_id", "times", "score"]
    missing, found = answer["results"][1:]
    assert missing == {"values": [{}, {}], "statuses": ["NOT_FOUND"] * 2, "event_timestamps": [EPOCH] * 2}
    assert found["values"] == [{"float_val": 0.25}, {"float_val": 0.75}]


def test_every_type(client: Client) -> None:
    answer = client.ask(asked(["items:*"], {"items_id": texts("extremes", "empties")}))
    values = {
        name: result["values"]
        for name, result in zip(answer["metadata"]["feature_names"]["val"], answer["results"], strict=True)
    }
    assert values == {
        "items_id": [{"string_val": "extremes"}, {"string_val": "empties"}],
        "flag": [{"bool_val": True}, {"bool_val": False}],
        "small": [{"int32_val": -(2**31)}, {"int32_val": 0}],
        "large": [{"int64_val": str(2**53 + 1)}, {"int64_val": str(-(2**63))}],
        "single": [{"float_val": "NaN"}, {"float_val": 0.0}],
        "double": [{"double_val": "NaN"}, {"double_val": 0.1}],
        "text": [{"string_val": 'quote " backslash \\ newline \n and \u2603 \U0001f600'}, {"string_val": ""}],
        "blob": [{"bytes_val": "AP8="}, {"bytes_val": ""}],
        "at": [{"unix_timestamp_val": "-62135596800"}, {"unix_timestamp_val": "253402300799"}],
        "integers": [{"int64_list_val": {"val": [str(2**63 - 1), str(-(2**63))]}}, {"int64_list_val": {}}],
        "floats": [{"float_list_val": {"val": [pytest.approx(0.1), pytest.approx(0.2)]}}, {"float_list_val": {}}],
        "words": [{"string_list_val": {"val": ["", "é", "z"]}}, {"string_list_val": {}}],
        "vector": [{"float_list_val": {"val": [pytest.approx(0.1), 0, -1.5]}}, {"float_list_val": {"val": [0, 0, 0]}}],
    }


def test_nulls_are_said_to_be_nulls(client: Client) -> None:
    answer = client.ask(asked(["items:*"], {"items_id": texts("nulls", "none")}))
    for result in answer["results"][1:]:
        assert result == {
            "values": [{}, {}],
            "statuses": ["NULL_VALUE", "NOT_FOUND"],
            "event_timestamps": [NEW_YEAR, EPOCH],
        }


def test_rows_that_are_too_old_are_marked_and_keep_their_values(client: Client) -> None:
    keys = {"recent_id": texts("fresh", "stale", "stale-null")}
    clicks, rate = client.ask(asked(["recent:clicks", "recent:rate"], keys))["results"][1:]
    assert clicks["values"] == [{"int64_val": "1"}, {"int64_val": "2"}, {"int64_val": "3"}]
    assert rate["values"] == [{"float_val": 0.5}, {"float_val": 0.25}, {}]
    assert clicks["statuses"] == rate["statuses"] == ["PRESENT", "OUTSIDE_MAX_AGE", "OUTSIDE_MAX_AGE"]
    assert EPOCH not in clicks["event_timestamps"]


def test_values_are_those_of_the_json_for_feast(server: Server, client: Client) -> None:
    features = [f"items:{name}" for name in ("flag", "small", "large", "text", "integers", "words", "vector", "at")]
    keys = [f"item-{number}" for number in range(20)]
    body = {"features": features, "entities": {"items_id": keys}}
    expected = server.ask("POST", "/get-online-features", body).json
    answer = client.ask(asked(features, {"items_id": texts(*keys)}))
    assert answer["metadata"]["feature_names"]["val"] == expected["metadata"]["feature_names"]
    for seen, wanted in zip(answer["results"], expected["results"], strict=True):
        assert [as_json(value) for value in seen["values"]] == wanted["values"]
        assert seen["statuses"] == wanted["statuses"]
        assert seen["event_timestamps"] == wanted["event_timestamps"]


def as_json(value: dict[str, Any]) -> Any:
    """Return a value in plain JSON; Protocol Buffers write 64-bit integers as strings."""
    for kind, content in value.items():
        if kind.endswith("list_val"):
            items = content.get("val", [])
            return [int(item) for item in items] if kind == "int64_list_val" else items
        return int(content) if kind in ("int64_val", "unix_timestamp_val") else content
    return None


def test_services_and_full_names(client: Client) -> None:
    entities = {"users_id": integers(1), "items_id": texts("empties")}
    request = asked("ranking", entities, full_feature_names=True, include_feature_view_version_metadata=True)
    assert client.ask(request)["metadata"] == {
        "feature_names": {"val": ["users_id", "items_id", "items__single", "users__score", "users__text"]},
        "feature_view_metadata": [{"name": "items"}, {"name": "users"}],
    }


def test_the_request_context_and_fields_yet_unknown_are_passed_over(client: Client) -> None:
    request = asked(["users:score"], USER, request_context={"x": texts("y")})
    unknown = b"\xfa\x07\x01?"
    answer, _ = client.call(as_sent(request) + unknown)
    assert decode("GetOnlineFeaturesResponse", answer)["results"][1]["values"] == [{"float_val": 0.75}]


def test_feasts_own_name_of_its_python_service_and_the_info(client: Client) -> None:
    request = as_sent(asked(["users:score"], USER))
    assert client.call(request, "GrpcFeatureServer")[0] == client.call(request)[0]
    assert decode("GetFeastServingInfoResponse", client.call(b"", method="GetFeastServingInfo")[0])["version"]


@pytest.mark.parametrize(
    ("request_", "code", "message"),
    [
        (asked(["nope:x"], USER), "NOT_FOUND", "no view 'nope'"),
        (asked("nope", USER), "NOT_FOUND", "no feature service 'nope'"),
        (asked(["users:nope"], USER), "NOT_FOUND", "'nope'"),
        (asked([], USER), "INVALID_ARGUMENT", "give either features"),
        (asked(["users:score"], {}), "INVALID_ARGUMENT", "'users_id'"),
        (asked(["pairs:seen"], {}), "INVALID_ARGUMENT", "'users_id'"),
        (asked(["pairs:seen"], {"users_id": texts("3")}), "INVALID_ARGUMENT", "must be int64"),
        (asked(["users:score"], {"users_id": texts("3")}), "INVALID_ARGUMENT", "must be int64"),
        (asked(["users:score"], {"users_id": {"val": [{"int64_val": 1}, {}]}}), "INVALID_ARGUMENT", "no key in row 1"),
        (
            asked(["users:score"], {"users_id": {"val": [{"int64_val": 1}, {"int32_val": 1}]}}),
            "INVALID_ARGUMENT",
            "int32_val in row 1",
        ),
        (asked(["users:score"], {"users_id": {"val": [{"bool_val": True}]}}), "INVALID_ARGUMENT", "no key in row 0"),
        (asked(["users:score"], USER | {"other": texts("a", "b")}), "INVALID_ARGUMENT", "lists must be of one length"),
        (
            asked(["users:text", "items:text"], USER | {"items_id": texts("a")}),
            "INVALID_ARGUMENT",
            "full_feature_names",
        ),
        (asked(["users:score"], {"users_id": integers(*range(51))}), "RESOURCE_EXHAUSTED", "max_keys"),
    ],
)
def test_errors(client: Client, request_: Asked, code: str, message: str) -> None:
    seen_code, seen_message = client.refusal(as_sent(request_))
    assert seen_code == code
    assert message in seen_message


def test_what_is_no_message_is_refused(client: Client) -> None:
    code, message = client.refusal(b"\xff\xff")
    assert (code, message.startswith("the request cannot be decoded")) == ("INVALID_ARGUMENT", True)
    entity = b"\x0a\x08users_id\x12\x01\xff"
    code, message = client.refusal(as_sent(asked(["users:score"], {})) + bytes([0x1A, len(entity)]) + entity)
    assert (code, message.startswith("entity 'users_id' cannot be decoded")) == ("INVALID_ARGUMENT", True)


def test_a_request_that_is_too_large_is_refused(client: Client) -> None:
    assert client.refusal(bytes(20_001))[0] == "RESOURCE_EXHAUSTED"


def test_answers_carry_the_version_and_are_counted(server: Server, client: Client) -> None:
    _, call = client.call(as_sent(asked(["users:score"], USER)))
    client.refusal(b"\xff")
    metadata = dict(call.trailing_metadata())
    assert metadata["x-shoal-version"] == str(server.ask("GET", "/v1/views").version)
    over_http = server.lookup(["users:score"], {"users_id": [1]})
    assert metadata["x-shoal-applied"] == over_http.headers["x-shoal-applied"]
    metrics = server.ask("GET", "/metrics").body.decode()
    for status in ("OK", "INVALID_ARGUMENT"):
        line = f'shoal_request_duration_seconds_count{{endpoint="grpc:GetOnlineFeatures",status="{status}"}}'
        assert line in metrics


def test_health(client: Client) -> None:
    for service in ("", SERVING, "GrpcFeatureServer"):
        eventually(lambda service=service: client.health(service) == "SERVING", "health")  # type: ignore[misc]
    with pytest.raises(grpc.RpcError) as caught:
        client.health("nope")
    assert caught.value.code().name == "NOT_FOUND"


@pytest.mark.skipif(not PYTHON_OF_FEAST.exists(), reason="Feast is not installed: make .venv-peers/installed")
def test_feasts_own_client_reads_the_same(server: Server, client: Client) -> None:
    program = Path(__file__).with_name("feast_client.py")
    asking = subprocess.run(
        [PYTHON_OF_FEAST, program, server.grpc_address],
        input=json.dumps(REQUESTS),
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE_SECONDS,
        cwd=program.parent,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )
    assert asking.returncode == 0, asking.stderr
    for request, seen in zip(REQUESTS, json.loads(asking.stdout), strict=True):
        # Feast's client sends maps, and maps have no order.
        assert by_name(client.ask(request)) == by_name(seen)


def by_name(answer: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    names = answer["metadata"]["feature_names"]["val"]
    assert len(set(names)) == len(names)
    return dict(zip(names, answer["results"], strict=True)), answer["metadata"].get("feature_view_metadata")
