"""The effects of `--feast-strict`: answers equal those of Feast's server, even where they lose data or mislead."""

import json
from typing import Any

import numpy as np
import pytest

from shoal.engine.base.errors import (
    AmbiguousFeature,
    LookupInvalid,
    RequestTooLarge,
    ShoalError,
    StoreNotFound,
    UnknownFeature,
)
from shoal.engine.feature_store import FeatureStore
from shoal.engine.lookup.allowance import UNLIMITED
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.server import feast
from tests import stores
from tests.every_type import RECENT, recent_rows

NUMBERS = stores.schema("numbers", single="float32", double="float64", floats="list<float32>", vector="float32[2]")
NAN = float("nan")
INFINITY = float("inf")
ROWS: list[stores.Row] = [
    {"numbers_id": "plain", "single": 0.1, "double": 0.1, "floats": [0.1], "vector": [0.1, 1.0]},
    {
        "numbers_id": "endless",
        "single": INFINITY,
        "double": -INFINITY,
        "floats": [INFINITY],
        "vector": [-INFINITY, 0.1],
    },
    {"numbers_id": "nothing", "single": NAN, "double": NAN, "floats": [NAN], "vector": [NAN, NAN]},
    {"numbers_id": "null"},
]
WIDE = float(np.float32(0.1))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    directory = tmp_path_factory.mktemp("strict")
    root = ExportRoot(directory / "root")
    stores.publish_snapshot(root, NUMBERS, ROWS)
    stores.publish_snapshot(root, RECENT, recent_rows())
    stores.load(directory / "store", root)
    return FeatureStore.open(directory / "store")


def answered(store: FeatureStore, features: list[str], *, strict: bool = True, **entities: list[Any]) -> dict[str, Any]:
    """Return the results by feature name."""
    asked = feast.FeastRequest(features=features, entities=entities)
    _, encode = feast.look_up(store, asked, strict=strict)
    document = json.loads(encode(UNLIMITED))
    return dict(zip(document["metadata"]["feature_names"], document["results"], strict=True))


@pytest.mark.parametrize(
    ("feature", "strict", "loose"),
    [
        ("single", [WIDE, "Infinity", None, None], [0.1, None, None, None]),
        ("double", [0.1, "-Infinity", None, None], [0.1, None, None, None]),
        ("floats", [[WIDE], ["Infinity"], ["NaN"], None], [[0.1], [None], [None], None]),
        (
            "vector",
            [[WIDE, 1.0], ["-Infinity", WIDE], ["NaN", "NaN"], None],
            [[0.1, 1.0], [None, 0.1], [None, None], None],
        ),
    ],
)
def test_floats(store: FeatureStore, feature: str, strict: list[Any], loose: list[Any]) -> None:
    keys = [row["numbers_id"] for row in ROWS]
    reference = f"numbers:{feature}"
    assert answered(store, [reference], numbers_id=keys)[feature]["values"] == strict
    assert answered(store, [reference], numbers_id=keys, strict=False)[feature]["values"] == loose


@pytest.mark.parametrize(("feature", "plain"), [("floats", [WIDE]), ("vector", [WIDE, 1.0]), ("single", WIDE)])
def test_finite_floats(store: FeatureStore, feature: str, plain: Any) -> None:
    results = answered(store, [f"numbers:{feature}"], numbers_id=["plain", "null", "none", "plain"])
    assert results[feature]["values"] == [plain, None, None, plain]


def test_whatever_is_there_is_present(store: FeatureStore) -> None:
    results = answered(store, ["recent:clicks", "recent:rate"], recent_id=["fresh", "stale", "stale-null", "none"])
    assert results["clicks"]["values"] == [1, 2, 3, None]
    assert results["rate"]["values"] == [0.5, 0.25, None, None]
    for name in ("clicks", "rate"):
        assert results[name]["statuses"] == ["PRESENT"] * 3 + ["NOT_FOUND"]


@pytest.mark.parametrize(
    ("error", "strict"),
    [
        (LookupInvalid("a key is missing"), 500),
        (AmbiguousFeature("two are the same"), 500),
        (UnknownFeature("no such feature", "feature", "x"), 500),
        (UnknownFeature("no such view", "view", "x"), 404),
        (UnknownFeature("no such service", "service", "x"), 404),
        (RequestTooLarge("too many"), 413),
        (StoreNotFound("nothing there"), 503),
    ],
)
def test_the_status_of_an_error(error: ShoalError, strict: int) -> None:
    for is_strict, status in ((True, strict), (False, error.http_status)):
        assert feast.feast_error_response(error, str(error), error.http_status, strict=is_strict).status == status


@pytest.mark.parametrize(
    ("content_type", "is_taken"),
    [
        ("application/json", True),
        ("application/vnd.api+json", True),
        ("text/plain", False),
        ("application/x-www-form-urlencoded", False),
    ],
)
def test_content_types(content_type: str, is_taken: bool) -> None:
    body = b'{"entities": {}}'
    if is_taken:
        assert feast.parse_feast_request(body, content_type).entities == {}
    else:
        with pytest.raises(LookupInvalid, match="valid dictionary"):
            feast.parse_feast_request(body, content_type)
