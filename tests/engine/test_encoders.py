"""Every answer format is compared with the published rows. The expected answers are computed without the engine."""

import base64
import io
import math
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pytest

from shoal import FeatureStore
from shoal.engine.base.errors import AmbiguousFeature, LookupInvalid, NotAcceptable
from shoal.engine.encoders import arrow_stream, json_feast, json_lookup, npy
from shoal.engine.format.schema import arrow_type
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.server.negotiation import choose_format
from tests import stores
from tests.every_type import FEATURES, ITEMS, RECENT, USERS, item_rows, recent_rows, user_rows

ROWS = {row["items_id"]: row for row in item_rows(200)}
KEYS = [*ROWS, "unknown", "unknown too"]
FLOATS = ("float32", "float64")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    directory = tmp_path_factory.mktemp("encoders")
    root = ExportRoot(directory / "root")
    stores.publish_snapshot(root, ITEMS, list(ROWS.values()))
    stores.publish_snapshot(root, USERS, user_rows(10))
    stores.publish_snapshot(root, RECENT, recent_rows())
    stores.publish_snapshot(root, stores.schema("empty", a="float32", b="string"), [])
    stores.load(directory / "store", root)
    return FeatureStore.open(directory / "store")


def time_text(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


def as_json(value: Any, feature_type: str) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if feature_type in ("float32", "list<float32>", "float32[3]"):
        return [shortest(item) for item in value] if isinstance(value, list) else shortest(value)
    if feature_type == "bytes":
        return base64.b64encode(value).decode()
    return time_text(value) if feature_type == "timestamp" else value


def shortest(value: float) -> float:
    """Return the float64 of the shortest text that denotes the float32."""
    return float(str(np.float32(value)))


def event_time(key: str) -> datetime | None:
    return ROWS[key].get(stores.TIMESTAMP, stores.NOW) if key in ROWS else None


def test_json_lookup_writes_every_type(store: FeatureStore) -> None:
    result = store.lookup(["items:*"], {"items_id": KEYS})
    expected = {
        "version": store.version().id,
        "keys": len(KEYS),
        "features": {
            f"items:{name}": [as_json(ROWS.get(key, {}).get(name), kind) for key in KEYS]
            for name, kind in FEATURES.items()
        },
        "status": {"items": ["PRESENT" if key in ROWS else "NOT_FOUND" for key in KEYS]},
        "event_timestamps": {"items": [time_text(time) if (time := event_time(key)) else None for key in KEYS]},
    }
    assert orjson.loads(json_lookup.encode(result)) == expected


def test_json_lookup_without_nulls_takes_the_columns_as_they_are(store: FeatureStore) -> None:
    keys = ["empties", "empties"]
    answer = orjson.loads(json_lookup.encode(store.lookup(["items:*"], {"items_id": keys})))
    assert answer["features"] == {
        f"items:{name}": [as_json(ROWS["empties"][name], kind)] * 2 for name, kind in FEATURES.items()
    }


def test_integers_beyond_2_to_the_53_are_exact(store: FeatureStore) -> None:
    content = json_lookup.encode(store.lookup(["items:large"], {"items_id": ["extremes"]}))
    assert b"[9007199254740993]" in content


def test_json_feast_writes_every_type(store: FeatureStore) -> None:
    entities = {"items_id": KEYS}
    content = json_feast.encode(store.lookup(["items:*"], entities), entities)
    answer = orjson.loads(content)
    assert answer["metadata"] == {"feature_names": ["items_id", *FEATURES]}
    assert answer["results"][0] == {
        "values": KEYS,
        "statuses": ["PRESENT"] * len(KEYS),
        "event_timestamps": ["1970-01-01T00:00:00Z"] * len(KEYS),
    }
    times = [time_text(event_time(key) or datetime(1970, 1, 1, tzinfo=UTC)) for key in KEYS]
    for (name, kind), result in zip(FEATURES.items(), answer["results"][1:], strict=True):
        values = [ROWS.get(key, {}).get(name) for key in KEYS]
        if kind == "timestamp":
            second = timedelta(seconds=1)
            expected = [(value - datetime(1970, 1, 1, tzinfo=UTC)) // second if value else None for value in values]
        else:
            expected = [as_json(value, kind) for value in values]
        assert result["values"] == expected
        assert result["event_timestamps"] == times
        assert result["statuses"] == [
            "NOT_FOUND" if key not in ROWS else "NULL_VALUE" if value is None else "PRESENT"
            for key, value in zip(KEYS, values, strict=True)
        ]


def test_feast_names(store: FeatureStore) -> None:
    entities: dict[str, list[Any]] = {"items_id": ["empties"], "users_id": [3]}
    result = store.lookup(["items:text", "users:text"], entities)
    with pytest.raises(AmbiguousFeature, match="more than one text"):
        json_feast.encode(result, entities)
    answer = orjson.loads(json_feast.encode(result, entities, full_feature_names=True))
    assert answer["metadata"]["feature_names"] == ["items_id", "users_id", "items__text", "users__text"]
    assert [result["values"] for result in answer["results"]] == [["empties"], [3], [""], ["user 3"]]


def test_arrow_stream_holds_every_type(store: FeatureStore) -> None:
    content = arrow_stream.encode(store.lookup(["items:*"], {"items_id": KEYS}))
    table = pa.ipc.open_stream(content).read_all()
    table.validate(full=True)
    for name, kind in FEATURES.items():
        column = table.column(f"items:{name}")
        assert column.type == arrow_type(kind)
        expected = pa.array([ROWS.get(key, {}).get(name) for key in KEYS], arrow_type(kind))
        # The reprs of two NaN are equal, but no comparison makes two NaN equal.
        assert repr(column.to_pylist()) == repr(expected.to_pylist())


@pytest.mark.parametrize(
    ("names", "dtype"),
    [
        (["single"], np.float32),
        (["single", "flag", "vector"], np.float32),
        (["single", "small"], np.float64),
        (["large", "double"], np.float64),
        (["vector", "at"], np.float64),
    ],
)
def test_npy_is_as_wide_as_its_features_need(store: FeatureStore, names: list[str], dtype: type) -> None:
    result = store.lookup_matrix([f"items:{name}" for name in names], {"items_id": KEYS})
    matrix = np.load(io.BytesIO(npy.encode(result)))
    assert matrix.dtype == dtype
    assert matrix.flags.c_contiguous
    expected = [[number for name in names for number in numbers(key, name)] for key in KEYS]
    np.testing.assert_array_equal(matrix, np.array(expected, dtype))


def numbers(key: str, name: str) -> list[float]:
    value = ROWS.get(key, {}).get(name)
    if name == "vector":
        return [math.nan] * 3 if value is None else [float(np.float32(item)) for item in value]
    if isinstance(value, datetime):
        return [(value - datetime(1970, 1, 1, tzinfo=UTC)) / timedelta(microseconds=1) / 1e6]
    return [math.nan if value is None else value]


def test_npy_refuses_what_is_no_number(store: FeatureStore) -> None:
    with pytest.raises(LookupInvalid, match="items:text is string"):
        npy.encode(store.lookup_matrix(["items:single", "items:text"], {"items_id": KEYS}))


@pytest.mark.parametrize("stale", ["null", "serve"])
def test_rows_outside_their_age(store: FeatureStore, stale: Any) -> None:
    keys = ["fresh", "stale", "stale-null", "unknown"]
    result = store.lookup(["recent:*"], {"recent_id": keys}, stale=stale)
    answer = orjson.loads(json_lookup.encode(result))
    assert answer["status"] == {"recent": ["PRESENT", "OUTSIDE_MAX_AGE", "OUTSIDE_MAX_AGE", "NOT_FOUND"]}
    served = stale == "serve"
    assert answer["features"]["recent:clicks"] == [1, 2 if served else None, 3 if served else None, None]
    feast = orjson.loads(json_feast.encode(result, {}))
    assert feast["results"][1] == {
        "values": [0.5, 0.25 if served else None, None, None],
        "statuses": ["PRESENT", "OUTSIDE_MAX_AGE", "OUTSIDE_MAX_AGE", "NOT_FOUND"],
        "event_timestamps": [time or "1970-01-01T00:00:00Z" for time in answer["event_timestamps"]["recent"]],
    }


def test_no_keys(store: FeatureStore) -> None:
    entities: dict[str, list[str]] = {"items_id": []}
    result = store.lookup(["items:*"], entities)
    assert set(map(tuple, orjson.loads(json_lookup.encode(result))["features"].values())) == {()}
    assert all(not result["values"] for result in orjson.loads(json_feast.encode(result, entities))["results"])
    assert pa.ipc.open_stream(arrow_stream.encode(result)).read_all().num_rows == 0
    numeric = store.lookup_matrix(["items:single", "items:vector"], entities)
    assert np.load(io.BytesIO(npy.encode(numeric))).shape == (0, 4)


def test_a_view_without_rows(store: FeatureStore) -> None:
    answer = orjson.loads(json_lookup.encode(store.lookup(["empty:*"], {"empty_id": ["a", "b"]})))
    assert answer["features"] == {"empty:a": [None, None], "empty:b": [None, None]}
    assert answer["status"] == {"empty": ["NOT_FOUND", "NOT_FOUND"]}


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("", "application/json"),
        ("*/*", "application/json"),
        ("application/*", "application/json"),
        ("text/html, */*;q=0.1", "application/json"),
        ("application/x-npy", "application/x-npy"),
        ("application/x-npy, */*", "application/x-npy"),
        ("APPLICATION/X-NPY;Q=0.5, application/json;q=0.4", "application/x-npy"),
        ("application/vnd.apache.arrow.stream;q=0.9, application/json", "application/json"),
        ("application/json;q=0, */*", "application/vnd.apache.arrow.stream"),
        ("application/json;charset=utf-8", "application/json"),
    ],
)
def test_negotiation(accept: str, media_type: str) -> None:
    assert choose_format(accept).media_type == media_type


@pytest.mark.parametrize("accept", ["text/html", "application/json;q=0", "image/*, text/*"])
def test_nothing_acceptable(accept: str) -> None:
    with pytest.raises(NotAcceptable, match="allows no format of lookups; the formats are application/json, "):
        choose_format(accept)


def test_a_quality_that_is_none() -> None:
    with pytest.raises(LookupInvalid, match="the quality 'much'"):
        choose_format("application/json;q=much")
