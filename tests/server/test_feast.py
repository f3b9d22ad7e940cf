"""POST /get-online-features as Feast's clients use it: the request's fields, the answer's shape, errors to raise."""

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
    found, times = ["PRESENT", "NOT_FOUND"], [time, epoch]
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


@pytest.mark.parametrize(
    ("body", "status", "kind", "message"),
    [
        ({"features": ["nope:x"], "entities": USER}, 404, "FeastObjectNotFoundException", "no view 'nope'"),
        ({"features": ["users:score"]}, 400, "FeastError", "the field 'entities' is missing"),
        ({"features": ["users:score"], "entities": {"users_id": 1}}, 400, "FeastError", "entities.users_id is 1"),
        ({"entities": USER}, 400, "FeastError", "give either features"),
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
