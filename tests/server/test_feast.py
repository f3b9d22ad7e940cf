"""POST /get-online-features as Feast's clients use it: the request's fields, the answer, and the errors to raise."""

import json
from typing import Any

import pytest

from tests.server.serving import Answer, Server

USER = {"users_id": [1]}


def feast(server: Server, **body: Any) -> Answer:
    return server.ask("POST", "/get-online-features", body)


def test_feast_lookup(server: Server) -> None:
    entities = {"users_id": [3, 99], "items_id": ["empties", "none"], "unused": ["x", "y"]}
    answer = feast(
        server,
        features=["users:score", "items:large"],
        entities=entities,
        full_feature_names=False,
        include_feature_view_version_metadata=False,
    )
    assert answer.status == 200
    epoch, time = "1970-01-01T00:00:00Z", "2026-01-01T00:00:00Z"
    found = ["PRESENT", "NOT_FOUND"]
    times = [time, epoch]
    assert answer.json == {
        "metadata": {"feature_names": ["users_id", "items_id", "score", "large"]},
        "results": [
            {"values": [3, 99], "statuses": ["PRESENT"] * 2, "event_timestamps": [epoch] * 2},
            {"values": ["empties", "none"], "statuses": ["PRESENT"] * 2, "event_timestamps": [epoch] * 2},
            {"values": [0.75, None], "statuses": found, "event_timestamps": times},
            {"values": [-(2**63), None], "statuses": found, "event_timestamps": times},
        ],
    }


def test_feast_service_and_full_names(server: Server) -> None:
    entities = {"users_id": [1], "items_id": ["empties"]}
    answer = feast(server, feature_service="ranking", entities=entities, full_feature_names=True)
    assert answer.json["metadata"]["feature_names"] == [
        "users_id",
        "items_id",
        "items__single",
        "users__score",
        "users__text",
    ]


def result(answer: Answer, name: str) -> tuple[list[Any], list[str]]:
    """Return the values and statuses of a feature in an answer."""
    assert answer.status == 200, answer.body
    found = answer.json["results"][answer.json["metadata"]["feature_names"].index(name)]
    return found["values"], found["statuses"]


@pytest.mark.parametrize(
    "more",
    [
        {"unheard_of": 1},
        {"feature_service": ""},
        {"feature_service": None},
        {"full_feature_names": 0},
        {"full_feature_names": "false"},
    ],
)
def test_what_a_feast_server_reads_over(server: Server, more: dict[str, Any]) -> None:
    answer = feast(server, features=["users:score"], entities=USER, **more)
    assert result(answer, "score") == ([0.25], ["PRESENT"])


def test_a_feature_service_goes_before_features(server: Server) -> None:
    entities = USER | {"items_id": ["empties"]}
    answer = feast(server, features=["nowhere:text"], feature_service="ranking", entities=entities)
    assert answer.json["metadata"]["feature_names"] == ["users_id", "items_id", "single", "score", "text"]


def error(answer: Answer) -> str:
    """Return the class of the exception that a Feast client would raise."""
    return str(json.loads(answer.json)["class"])


@pytest.mark.parametrize("reference", ["users@latest:score", "users@LATEST:score", "users@:score"])
def test_the_latest_version_of_a_view_is_the_view(server: Server, reference: str) -> None:
    answer = feast(server, features=["users:text", reference], entities=USER, full_feature_names=True)
    assert result(answer, "users__score") == ([0.25], ["PRESENT"])
    answer = feast(server, features=["users:score", reference], entities=USER)
    assert (answer.status, error(answer)) == (400, "FeatureNameCollisionError")


def test_the_path_may_end_with_a_slash(server: Server) -> None:
    path = "/get-online-features/"
    body = {"features": ["users:score"], "entities": USER}
    assert server.ask("POST", path, body).json == feast(server, **body).json
    assert error(server.ask("POST", path, body | {"features": ["nope:x"]})) == "FeatureViewNotFoundException"
    assert server.ask("POST", path + "/", body).status == 404
    assert server.ask("GET", path).headers["allow"] == "POST"


def test_versions_of_views_are_asked_for(server: Server) -> None:
    features = ["users:score", "items:large", "users:text"]
    entities = USER | {"items_id": ["empties"]}
    answer = feast(server, features=features, entities=entities, include_feature_view_version_metadata=True)
    assert answer.json["metadata"]["feature_view_metadata"] == [{"name": "users"}, {"name": "items"}]


def test_every_join_key_of_the_store_is_echoed(server: Server) -> None:
    entities = {"recent_id": ["any"], "unheard_of": [1], "users_id": [1]}
    answer = feast(server, features=["users:score"], entities=entities)
    assert answer.json["metadata"]["feature_names"] == ["recent_id", "users_id", "score"]
    answer = feast(server, features=["users:score"], entities=entities | {"unheard_of": [1, 2]})
    assert answer.status == 400


def test_keys_are_taken_for_what_they_mean(server: Server) -> None:
    answer = feast(server, features=["users:score"], entities={"users_id": ["1", " 2 ", 3.0, True, None, 99]})
    assert result(answer, "users_id")[0] == [1, 2, 3, 1, None, 99]
    assert result(answer, "score") == (
        [0.25, 0.5, 0.75, 0.25, None, None],
        ["PRESENT"] * 4 + ["NOT_FOUND"] * 2,
    )
    answer = feast(server, features=["items:large"], entities={"items_id": [5, 5.0, True, "empties", None]})
    assert result(answer, "items_id")[0] == ["5", "5.0", "True", "empties", None]
    assert result(answer, "large") == ([None] * 3 + [-(2**63), None], ["NOT_FOUND"] * 3 + ["PRESENT", "NOT_FOUND"])


def test_event_times_have_as_many_digits_as_they_need(server: Server) -> None:
    answer = feast(server, features=["items:large"], entities={"items_id": ["item-1", "empties", "none"]})
    times = answer.json["results"][1]["event_timestamps"]
    assert times == ["2025-06-03T02:12:14.720487Z", "2026-01-01T00:00:00Z", "1970-01-01T00:00:00Z"]


def test_rows_past_their_ttl_and_nulls_are_told_apart(server: Server) -> None:
    answer = feast(
        server, features=["recent:clicks", "items:large"], entities={"recent_id": ["stale"], "items_id": ["nulls"]}
    )
    assert result(answer, "clicks") == ([None], ["OUTSIDE_MAX_AGE"])
    assert result(answer, "large") == ([None], ["NULL_VALUE"])


def test_any_content_type_is_taken_for_json(server: Server) -> None:
    body = json.dumps({"features": ["users:score"], "entities": USER}).encode()
    for headers in ({}, {"Content-Type": "application/x-www-form-urlencoded"}):
        assert result(server.ask("POST", "/get-online-features", body, **headers), "score")[0] == [0.25]


def test_health_answers_head(server: Server) -> None:
    assert server.ask("HEAD", "/health").status == 200


@pytest.mark.parametrize(
    ("body", "details"),
    [
        (b"", [{"type": "missing", "loc": ["body"], "msg": "Field required", "input": None}]),
        (
            b"{nonsense",
            [
                {
                    "type": "json_invalid",
                    "loc": ["body", 1],
                    "msg": "JSON decode error",
                    "input": {},
                    "ctx": {"error": "Expecting property name enclosed in double quotes"},
                }
            ],
        ),
        (
            b'{"features": []}',
            [{"type": "missing", "loc": ["body", "entities"], "msg": "Field required", "input": {"features": []}}],
        ),
        (
            b'{"entities": {"users_id": 1}}',
            [
                {
                    "type": "list_type",
                    "loc": ["body", "entities", "users_id"],
                    "msg": "Input should be a valid list",
                    "input": 1,
                }
            ],
        ),
    ],
)
def test_bodies_of_another_shape_are_refused_in_detail(server: Server, body: bytes, details: Any) -> None:
    answer = server.ask("POST", "/get-online-features", body)
    assert (answer.status, answer.json) == (422, {"detail": details})


@pytest.mark.parametrize(
    "body",
    [
        b"\xff",
        b"[" * 5000,
        b'{"entities": {"users_id": [NaN]}}',
        b"1" * 5000,
        b'{"entities": {"users_id": ["\\ud800"]}}',
    ],
)
def test_bodies_that_are_hard_to_read_are_refused(server: Server, body: bytes) -> None:
    answer = server.ask("POST", "/get-online-features", body)
    assert answer.status == 422
    assert answer.json["detail"]


@pytest.mark.parametrize(
    ("body", "status", "kind", "message"),
    [
        (
            {"features": ["nope:x"], "entities": USER},
            404,
            "FeatureViewNotFoundException",
            "Feature view nope does not exist: the store has no view 'nope'; it has items, pairs, recent",
        ),
        (
            {"feature_service": "nope", "entities": USER},
            404,
            "FeatureServiceNotFoundException",
            "Feature service nope does not exist",
        ),
        ({"features": ["users:x"], "entities": USER}, 404, "FeastObjectNotFoundException", "no feature 'x'"),
        ({"entities": USER}, 400, "FeastError", "No features specified for retrieval"),
        ({"features": ["users:score"], "entities": {}}, 400, "FeastError", "is looked up by 'users_id'"),
        ({"features": ["users:score"], "entities": {"users_id": ["x"]}}, 400, "FeastError", "must be int64: invalid"),
        ({"features": ["users:score"], "entities": {"users_id": [2**63]}}, 400, "FeastError", "must be int64"),
        ({"features": ["users:score"], "entities": {"users_id": [[1]]}}, 400, "FeastError", "but holds lists"),
        ({"features": ["users:score"], "entities": {"users_id": [1] * 51}}, 413, "FeastError", "accepts at most 50"),
        (
            {"features": ["users:text", "items:text"], "entities": USER | {"items_id": ["a"]}},
            400,
            "FeatureNameCollisionError",
            "set full_feature_names",
        ),
    ],
)
def test_feast_errors_can_be_raised_by_its_client(
    server: Server, body: dict[str, Any], status: int, kind: str, message: str
) -> None:
    answer = feast(server, **body)
    detail = json.loads(answer.json)
    assert answer.status == status
    assert (detail["module"], detail["class"]) == ("feast.errors", kind)
    assert message in detail["message"]
