"""The rows that Feast's server and Shoal's are both loaded with, and the requests that both get. They are always the
same."""

import json
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shoal.engine.format.schema import FeatureService, arrow_type
from tests import stores
from tests.every_type import ITEMS, PAIRS, USERS, item_rows, pair_rows, user_rows

AGEING = stores.schema("ageing", key="int64", ttl=timedelta(hours=1), clicks="int64", rate="float32")
VIEWS = (ITEMS, USERS, PAIRS, AGEING)
SERVICES = (
    FeatureService(name="ranking", features=("items:single", "items:double", "pairs:seen", "ageing:rate")),
    FeatureService(name="of_pairs", features=("pairs:times", "ageing:clicks", "items:words")),
)
KEYS: dict[str, str] = {"users_id": "int64", "items_id": "string", "ageing_id": "int64"}
WRONG_FEATURES = ("users:nothing", "nowhere:text", "users", "users:score:x", "*")
NOT_NUMBERS: list[dict[str, Any]] = [
    {
        "items_id": "infinite",
        "single": float("inf"),
        "double": float("-inf"),
        "floats": [0.1, float("nan"), float("inf")],
        "vector": [float("-inf"), 0.1, float("nan")],
        "at": datetime(1960, 2, 3, 4, 5, 6, 700_000, tzinfo=UTC),
        "blob": b"b",
        stores.TIMESTAMP: datetime(2025, 5, 5, 5, 5, 5, 123_000, tzinfo=UTC),
    },
    {"items_id": "digits", "single": 16777216.0, "double": 1e22, "large": 2**53 + 1, "floats": [1e-7, 3.4e38]},
    {"items_id": "small", "single": 1e-7, "double": 5e-324, "text": "\u2028 é ☃", "floats": [], "words": [""]},
    {"items_id": "7", "double": 7.0},
    {"items_id": "7.5", "double": 7.5},
    {"items_id": "True", "flag": True},
]


def rows() -> dict[str, list[stores.Row]]:
    """Return the rows of each view."""
    items = item_rows(20)
    # Feast converts this time to a float, which would round it up to the year 10000.
    items[2]["at"] = items[2]["at"].replace(microsecond=0)
    ages = [timedelta(minutes=1), timedelta(hours=5), timedelta(days=300)]
    now = datetime.now(UTC)
    return {
        "items": [*items, *NOT_NUMBERS],
        "users": [*user_rows(10), {"users_id": 2**62 + 1}, {"users_id": -(2**63), "score": 0.1}],
        "pairs": pair_rows(),
        "ageing": [
            {"ageing_id": key, "clicks": key, "rate": None if key % 2 else key / 7, stores.TIMESTAMP: now - age}
            for key, age in enumerate(ages * 2)
        ],
    }


def write_data(directory: Path, rows_of: dict[str, list[stores.Row]]) -> None:
    """Write the definitions and rows in the form that `feast_repo.py` reads."""
    directory.mkdir()
    for view in VIEWS:
        of_view = rows_of[view.name]
        types = {key.name: key.type for key in view.join_keys} | {each.name: each.type for each in view.features}
        columns = {name: pa.array([row.get(name) for row in of_view], arrow_type(of)) for name, of in types.items()}
        times = [row.get(stores.TIMESTAMP, stores.NOW) for row in of_view]
        columns[stores.TIMESTAMP] = pa.array(times, pa.timestamp("us", tz="UTC"))
        pq.write_table(pa.table(columns), directory / f"{view.name}.parquet")
    definitions = {
        "views": [
            view.model_dump(mode="json") | {"ttl_seconds": view.ttl.total_seconds() if view.ttl else None}
            for view in VIEWS
        ],
        "services": [service.model_dump(mode="json") for service in SERVICES],
    }
    (directory / "definitions.json").write_text(json.dumps(definitions))


def requests(count: int, seed: int) -> list[dict[str, Any]]:
    """Return bodies of requests: most are valid, some are unusual, some are invalid."""
    source = random.Random(seed)
    return [_request(source) for _ in range(count)]


def _request(source: random.Random) -> dict[str, Any]:
    body: dict[str, Any] = {}
    views = source.sample(VIEWS, source.choice([1, 1, 2, 3]))
    keys: dict[str, str] = {key.name: key.type for view in views for key in view.join_keys}
    if source.random() < 0.15:
        body["feature_service"] = source.choice([*SERVICES, SERVICES[0]]).name
        keys = KEYS
    if "feature_service" not in body or source.random() < 0.2:
        features = [
            f"{view.name}:{feature.name}"
            for view in views
            for feature in source.sample(view.features, source.randint(1, len(view.features)))
        ]
        if source.random() < 0.1:
            features[0] = features[0].replace(":", source.choice(["@latest:", "@:", "@Latest:"]))
        body["features"] = features
        if source.random() < 0.05:
            features.append(source.choice([*WRONG_FEATURES, features[0]]))
    if source.random() < 0.5:
        body["full_feature_names"] = source.choice([True, True, False, "true", 1, "no", 0])
    if source.random() < 0.3:
        body["include_feature_view_version_metadata"] = source.choice([True, False])
    if source.random() < 0.1:
        body["feature_service"] = body.get("feature_service", source.choice(["", None, None, "nothing"]))
    if source.random() < 0.2:
        body["unheard_of"] = source.choice([1, None, {"a": []}])
    body["entities"] = _entities(source, keys)
    if source.random() < 0.05:
        _break(source, body)
    return body


def _entities(source: random.Random, keys: dict[str, str]) -> dict[str, list[Any]]:
    count = source.randint(1, 8)
    unusual = source.random() < 0.25
    entities = {name: [_key(source, of, unusual) for _ in range(count)] for name, of in keys.items()}
    if source.random() < 0.2:
        # If no requested view has this key, Feast guesses the type of its values from the first one.
        name = source.choice(sorted(KEYS))
        entities.setdefault(name, [_key(source, KEYS[name], False) for _ in range(count)])
    if source.random() < 0.1:
        entities["unheard_of"] = [1] * count
    if source.random() < 0.08 and entities:
        del entities[source.choice(sorted(entities))]
    if source.random() < 0.03 and entities:
        entities[source.choice(sorted(entities))].append(1)
    names = source.sample(sorted(entities), len(entities))
    return {name: entities[name] for name in names}


def _key(source: random.Random, key_type: str, unusual: bool) -> Any:
    if key_type == "string":
        known: list[Any] = [
            f"item-{source.randrange(24)}",
            "extremes",
            "empties",
            "nulls",
            *(row["items_id"] for row in NOT_NUMBERS),
        ]
        odd: list[Any] = [7, 7.5, True, 2**53 + 1, "", "é"]
        return source.choice(odd) if unusual and source.random() < 0.5 else source.choice(known)
    known = [source.randrange(12), source.randrange(6), 2**62 + 1, -(2**63), 99]
    odd = ["1", " 2 ", "+3", "1_0", 1.0, 2.7, -0.5, True, False]
    if unusual and source.random() < 0.05:
        odd = ["x", 2**63, "1.5", ""]
    return source.choice(odd) if unusual and source.random() < 0.5 else source.choice(known)


def _break(source: random.Random, body: dict[str, Any]) -> None:
    """Give a request body a wrong shape."""
    name, value = source.choice(
        [
            ("entities", [{"users_id": 1}]),
            ("entities", {"users_id": 1}),
            ("entities", {}),
            ("entities", None),
            ("features", None),
            ("features", "users:score"),
            ("features", [1, "users:score", 2]),
            ("features", []),
            ("feature_service", 7),
            ("full_feature_names", None),
            ("full_feature_names", "maybe"),
            ("include_feature_view_version_metadata", 2),
        ]
    )
    body[name] = value
    if source.random() < 0.2:
        body.pop("entities")


ASKED = b'{"features": ["users:score"], "entities": {"users_id": [1]}}'
WRONG_BODIES: list[tuple[bytes, str | None]] = [
    (b"", "application/json"),
    (b"{", "application/json"),
    (b'{"entities": }', "application/json"),
    (b'{"entities": {"users_id": [1]}} trailing', "application/json"),
    (b"{'entities': {}}", "application/json"),
    (b"[]", "application/json"),
    (b"null", "application/json"),
    (b'"text"', "application/json"),
    (b"17", "application/json"),
    (ASKED, "application/json; charset=utf-8"),
    (ASKED, "application/vnd.api+json"),
    (ASKED, "text/plain"),
    (ASKED, "application/x-www-form-urlencoded"),
    (ASKED, None),
    (
        ASKED[:-1] + b', "entities": {"users_id": [2]}}',
        "application/json",
    ),
]
"""Bodies with their Content-Type: not JSON, of another shape, or with another media type."""
