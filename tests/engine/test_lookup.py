"""A lookup from a store on disk: the valid requests, the forms of keys, and the answer about each key."""

import gc
import shutil
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from shoal import FeatureStore, LookupResult
from shoal.engine.base.errors import LookupInvalid, StaleFeatures, UnknownFeature
from shoal.engine.format.schema import FeatureService, ViewSchema
from shoal.engine.kernels.gathering import Status
from shoal.engine.lookup.columns import lookup
from shoal.engine.root.export_root import ExportRoot
from tests import stores
from tests.engine.values import comparable, plain
from tests.every_type import FEATURES, ITEMS, SERVICE, USERS, item_rows, user_rows

COUNTS = ViewSchema.model_validate(
    {
        "name": "counts",
        "join_keys": [{"name": "items_id", "type": "string"}, {"name": "users_id", "type": "int64"}],
        "features": [{"name": "clicks", "type": "int64"}],
    }
)
EMPTY = stores.schema("empty", **FEATURES)
NOW = datetime.now(UTC)
HOUR = timedelta(hours=1)
RECENT = stores.schema("recent", ttl=HOUR, clicks="int64", text="string")
ITEM_ROWS = item_rows(120)
ITEM_KEYS = [row["items_id"] for row in ITEM_ROWS]
PRESENT = Status.PRESENT
NULL = Status.NULL_VALUE
NOT_FOUND = Status.NOT_FOUND
TOO_OLD = Status.OUTSIDE_MAX_AGE


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with views of every type, with one and two join keys, with a TTL, and without rows."""
    directory = tmp_path_factory.mktemp("lookup")
    root = ExportRoot(directory / "root")
    stores.publish_snapshot(root, ITEMS, ITEM_ROWS)
    stores.publish_snapshot(root, USERS, user_rows(50))
    counts: list[stores.Row] = [{"items_id": f"item-{n}", "users_id": n % 7 - 3, "clicks": n} for n in range(40)]
    stores.publish_snapshot(root, COUNTS, counts)
    stores.publish_snapshot(root, EMPTY, [])
    recent: list[stores.Row] = [
        {"recent_id": "young", "clicks": 1, "text": "y", stores.TIMESTAMP: NOW - HOUR / 2},
        {"recent_id": "old", "clicks": 2, "text": "o", stores.TIMESTAMP: NOW - 2 * HOUR},
        {"recent_id": "old with null", "clicks": None, "text": "n", stores.TIMESTAMP: NOW - 2 * HOUR},
        {"recent_id": "to come", "clicks": 4, "text": "t", stores.TIMESTAMP: NOW + 24 * HOUR},
    ]
    stores.publish_snapshot(root, RECENT, recent)
    root.publish_services((SERVICE, FeatureService(name="all", features=("items:*", "counts:clicks"))))
    stores.load(directory / "store", root)
    return directory / "store"


@pytest.fixture
def store(path: Path) -> FeatureStore:
    return FeatureStore.open(path)


# --- what comes back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_of_every_type_comes_back_as_published(store: FeatureStore, feature: str) -> None:
    asked = [*ITEM_KEYS, "missing"]
    column = store.lookup([f"items:{feature}"], {"items_id": asked})[f"items:{feature}"]
    values = [*(row.get(feature) for row in ITEM_ROWS), None]
    array = column.to_arrow()
    array.validate(full=True)
    assert [plain(value) for value in array.to_pylist()] == comparable(values, FEATURES[feature])
    statuses = [PRESENT if value is not None else NULL for value in values[:-1]]
    assert column.status.tolist() == [*statuses, NOT_FOUND]


def test_all_features_of_a_view_come_in_the_order_of_its_schema(store: FeatureStore) -> None:
    batch = store.lookup(["items:*"], {"items_id": ITEM_KEYS}).to_arrow()
    batch.validate(full=True)
    assert batch.schema.names == [f"items:{name}" for name in FEATURES]
    assert batch.num_rows == len(ITEM_ROWS)


def test_event_times_are_those_published_and_missing_where_there_is_no_row(store: FeatureStore) -> None:
    rows = store.lookup(["items:flag"], {"items_id": [*ITEM_KEYS, "missing"]}).views["items"]
    published = [row.get(stores.TIMESTAMP, stores.NOW).replace(tzinfo=None) for row in ITEM_ROWS]
    assert rows.event_timestamps.tolist()[:-1] == published
    assert np.isnat(rows.event_timestamps[-1])


def test_features_of_several_views_come_in_the_order_asked(store: FeatureStore) -> None:
    asked = ["users:text", "items:text", "counts:clicks", "users:score", "items:flag"]
    result = store.lookup(asked, {"items_id": ["item-3", "item-4"], "users_id": [0, 1]})
    assert [column.reference for column in result.columns] == asked
    assert result.to_pydict()["users:text"] == ["user 0", "user 1"]
    assert result.to_pydict()["counts:clicks"] == [3, 4]
    assert set(result.views) == {"users", "items", "counts"}
    assert result.version == store.version().id
    assert result.to_arrow().schema.metadata == {b"shoal.version": str(result.version).encode()}


def test_a_feature_asked_for_twice_comes_twice(store: FeatureStore) -> None:
    asked = ["users:score", "items:text", "users:score", "items:text", "items:text"]
    result = store.lookup(asked, {"users_id": 3, "items_id": "item-1"})
    assert [column.reference for column in result.columns] == asked
    assert result.to_arrow().schema.names == asked
    assert result.columns[1].to_arrow().equals(result.columns[4].to_arrow())
    twice = store.lookup(["users:score", "users:score"], {"users_id": [3, 4]}).to_numpy()
    assert twice.tolist() == [[0.75, 0.75], [1.0, 1.0]]


def test_a_star_beside_a_feature_of_the_same_view_repeats_it(store: FeatureStore) -> None:
    result = store.lookup(["users:text", "users:*"], {"users_id": 1})
    assert [column.reference for column in result.columns] == ["users:text", "users:score", "users:text"]


def test_a_feature_service_stands_for_its_features(store: FeatureStore) -> None:
    result = store.lookup("ranking", {"users_id": 1, "items_id": ["item-1", "item-2"]})
    assert [column.reference for column in result.columns] == ["items:single", "users:score", "users:text"]
    everything = store.lookup("all", {"users_id": 1, "items_id": ["item-1"]})
    assert len(everything.columns) == len(FEATURES) + 1


def test_a_column_that_was_not_asked_for_is_not_there(store: FeatureStore) -> None:
    with pytest.raises(KeyError, match="users:text"):
        store.lookup(["users:score"], {"users_id": 1})["users:text"]


def test_an_answer_outlives_its_store(path: Path, tmp_path: Path) -> None:
    shutil.copytree(path, tmp_path / "copy")
    store = FeatureStore.open(tmp_path / "copy")
    result = store.lookup(["items:*"], {"items_id": ITEM_KEYS})
    before = result.to_arrow()
    del store
    gc.collect()
    shutil.rmtree(tmp_path / "copy")
    assert _plain_columns(result.to_arrow()) == _plain_columns(before)


# --- keys -----------------------------------------------------------------------------------------------------

STRINGS = ["item-3", "missing", "item-4"]
STRING_FORMS: dict[str, Any] = {
    "list": STRINGS,
    "tuple": tuple(STRINGS),
    "numpy strings": np.array(STRINGS),
    "numpy objects": np.array(STRINGS, object),
    "every second of numpy strings": np.array([x for key in STRINGS for x in (key, "other")])[::2],
    "arrow": pa.array(STRINGS),
    "large arrow": pa.array(STRINGS, pa.large_string()),
    "arrow view": pa.array(STRINGS, pa.string_view()),
    "dictionary": pa.array(STRINGS).dictionary_encode(),
    "chunked": pa.chunked_array([STRINGS[:1], [], STRINGS[1:]]),
    "chunked dictionary": pa.chunked_array([pa.array(STRINGS[:2]), pa.array(STRINGS[2:])]).dictionary_encode(),
    "slice": pa.array(["before", *STRINGS, "behind"])[1:-1],
    "slice of chunks": pa.chunked_array([["before", STRINGS[0]], [*STRINGS[1:], "behind"]])[1:-1],
}
INTEGERS = [3, 999, 0]
INTEGER_FORMS: dict[str, Any] = {
    "list": INTEGERS,
    "numpy scalars": [np.int32(3), np.int64(999), np.int16(0)],
    **{str(np.dtype(of)): np.array(INTEGERS, of) for of in (np.int16, np.int32, np.int64, np.uint16, np.uint64)},
    "every second": np.array([3, -1, 999, -1, 0, -1])[::2],
    "backwards": np.array(INTEGERS[::-1])[::-1],
    "arrow": pa.array(INTEGERS),
    "small arrow": pa.array(INTEGERS, pa.int16()),
    "unsigned arrow": pa.array(INTEGERS, pa.uint64()),
    "chunked": pa.chunked_array([INTEGERS[:2], INTEGERS[2:]]),
    "slice": pa.array([7, *INTEGERS, 8])[1:-1],
}


@pytest.mark.parametrize("form", STRING_FORMS.values(), ids=STRING_FORMS.keys())
def test_string_keys_come_in_many_forms(store: FeatureStore, form: Any) -> None:
    found = store.lookup(["counts:clicks"], {"items_id": form, "users_id": [0, 0, 1]})
    assert found.to_pydict() == {"counts:clicks": [3, None, 4]}


@pytest.mark.parametrize("form", INTEGER_FORMS.values(), ids=INTEGER_FORMS.keys())
def test_integer_keys_come_in_many_forms(store: FeatureStore, form: Any) -> None:
    assert store.lookup(["users:text"], {"users_id": form}).to_pydict() == {"users:text": ["user 3", None, "user 0"]}


@pytest.mark.parametrize("scalar", [3, np.int64(3), np.int8(3), np.uint64(3)])
def test_a_scalar_holds_for_every_row(store: FeatureStore, scalar: Any) -> None:
    entities = {"users_id": scalar, "items_id": ["item-6", "item-13", "missing"]}
    result = store.lookup(["users:text", "counts:clicks"], entities)
    assert result.to_pydict() == {"users:text": ["user 3"] * 3, "counts:clicks": [6, 13, None]}
    assert result.views["users"].status.tolist() == [PRESENT] * 3


def test_scalars_alone_ask_for_one_row(store: FeatureStore) -> None:
    result = store.lookup(["users:text", "counts:clicks"], {"users_id": 3, "items_id": "item-6"})
    assert (result.keys, result.to_pydict()) == (1, {"users:text": ["user 3"], "counts:clicks": [6]})
    assert store.lookup(["items:text"], {"items_id": np.str_("item-1")}).keys == 1


def test_entities_that_no_view_needs_still_count_rows(store: FeatureStore) -> None:
    assert (
        store.lookup(["users:text"], {"users_id": 3, "session": ["a", "b"]}).to_pydict()["users:text"] == ["user 3"] * 2
    )


def test_a_key_may_be_asked_for_again(store: FeatureStore) -> None:
    assert store.lookup(["users:text"], {"users_id": [1, 2, 1, 1]}).to_pydict()["users:text"] == [
        "user 1",
        "user 2",
        "user 1",
        "user 1",
    ]


NO_KEYS: dict[str, Any] = {
    "list": [],
    "numpy": np.array([], object),
    "numpy integers": np.array([], np.int64),
    "arrow": pa.array([], pa.string()),
    "arrow nulls": pa.array([], pa.null()),
    "slice": pa.array(["a", "b"])[2:],
    "no chunks": pa.chunked_array([], pa.string()),
    "empty chunks": pa.chunked_array([[], []], pa.string()),
    "dictionary": pa.array(["a"]).dictionary_encode()[1:],
}


@pytest.mark.parametrize("form", NO_KEYS.values(), ids=NO_KEYS.keys())
def test_no_keys_have_an_empty_answer(store: FeatureStore, form: Any) -> None:
    result = store.lookup(["items:*", "counts:clicks", "users:score"], {"items_id": form, "users_id": 3})
    batch = result.to_arrow()
    batch.validate(full=True)
    assert (result.keys, batch.num_rows, batch.num_columns) == (0, 0, len(FEATURES) + 2)
    assert batch.schema == store.lookup(
        ["items:*", "counts:clicks", "users:score"], {"items_id": "a", "users_id": 3}
    ).to_arrow().schema.with_metadata(batch.schema.metadata)
    assert all(values == [] for values in result.to_pydict().values())
    assert store.lookup(["users:score", "items:vector"], {"items_id": form, "users_id": 3}).to_numpy().shape == (0, 4)
    assert store.lookup(["users:score"], {"items_id": form, "users_id": 3}).to_numpy().shape == (0, 1)
    assert all(rows.status.size == rows.event_time.size == 0 for rows in result.views.values())


@pytest.mark.parametrize("keys", [[], ["a"], ["a", "b", "", "nulls"] * 50])
def test_a_view_without_rows_has_no_key(store: FeatureStore, keys: list[str]) -> None:
    result = store.lookup(["empty:*"], {"empty_id": keys})
    result.to_arrow().validate(full=True)
    assert result.to_pydict() == {f"empty:{name}": [None] * len(keys) for name in FEATURES}
    assert result.views["empty"].status.tolist() == [NOT_FOUND] * len(keys)


def test_keys_that_are_incomplete_are_found_nowhere(store: FeatureStore) -> None:
    features = ["counts:clicks", "users:text", "items:text"]
    entities = {"items_id": ["item-1", None, "item-3", "item-4"], "users_id": [-2, -1, None, 1]}
    with pytest.raises(LookupInvalid, match="is null in row"):
        store.lookup(features, entities)
    result = store.lookup(features, entities, incomplete="not_found")
    assert result["counts:clicks"].status.tolist() == [PRESENT, NOT_FOUND, NOT_FOUND, PRESENT]
    assert result["users:text"].status.tolist() == [NOT_FOUND, NOT_FOUND, NOT_FOUND, PRESENT]
    assert result["items:text"].status.tolist()[1] == NOT_FOUND


@pytest.mark.parametrize("given", [{"items_id": ["item-1", "item-2"]}, {"users_id": 1}])
def test_a_composite_key_of_which_a_part_is_not_given(store: FeatureStore, given: dict[str, Any]) -> None:
    with pytest.raises(LookupInvalid, match="which is not among the entities"):
        store.lookup(["counts:clicks"], given)
    result = store.lookup(["counts:clicks"], given, incomplete="not_found")
    assert set(result["counts:clicks"].status.tolist()) == {NOT_FOUND}
    with pytest.raises(LookupInvalid, match="not among the entities"):
        store.lookup(["counts:clicks"], {"others_id": 1}, incomplete="not_found")
    with pytest.raises(LookupInvalid, match="must be"):
        store.lookup(["counts:clicks"], {"users_id": ["x"]}, incomplete="not_found")


# --- requests that are wrong ----------------------------------------------------------------------------------

WRONG_ENTITIES: dict[str, tuple[Mapping[str, Any], str]] = {
    "none": ({}, "not among the entities .none."),
    "another": ({"items_id": "a"}, "looked up by 'users_id', which is not among the entities .items_id."),
    "null": ({"users_id": None}, "'users_id' is null in row 0"),
    "null in a list": ({"users_id": [1, 2, None]}, "'users_id' is null in row 2"),
    "only nulls": ({"users_id": [None, None]}, "'users_id' is null in row 0"),
    "null in arrow": ({"users_id": pa.array([1, None])}, "'users_id' is null in row 1"),
    "string": ({"users_id": "1"}, "must be int64, but holds string, such as '1'"),
    "strings": ({"users_id": ["1"]}, "must be int64, but holds string"),
    "float": ({"users_id": 1.0}, "must be int64, but holds double, such as 1.0"),
    "floats": ({"users_id": np.array([1.5])}, "must be int64, but holds double, such as 1.5"),
    "bool": ({"users_id": True}, "must be int64, but holds bool"),
    "bytes": ({"users_id": b"1"}, "must be int64, but holds binary"),
    "too large": ({"users_id": 2**63}, "must be int64"),
    "far too large": ({"users_id": 2**100}, "must be int64"),
    "too large in numpy": ({"users_id": np.array([2**63], np.uint64)}, "must be int64"),
    "instants": ({"users_id": np.array(["2026-01-01"], "M8[us]")}, "must be int64, but holds timestamp"),
    "nested": ({"users_id": [[1]]}, "must be int64, but holds list"),
    "of another byte order": ({"users_id": np.array([1], ">i8")}, "must be int64: Byte-swapped"),
    "two dimensions": ({"users_id": np.array([[1]])}, "must be int64"),
    "objects": ({"users_id": [object()]}, "must be int64"),
    "mixed": ({"users_id": [1, "a"]}, "must be int64"),
    "an iterator": ({"users_id": iter([1])}, "is of type list_iterator; give a scalar, a list"),
    "an arrow scalar": ({"users_id": pa.scalar(1)}, "is of type Int64Scalar; give a scalar, a list"),
    "no dimension": ({"users_id": np.array(1)}, "is of type ndarray; give a scalar, a list"),
    "unequal lists": ({"users_id": [1, 2], "items_id": ["a"]}, "'items_id' has 1 values, but 'users_id' has 2"),
    "an empty list and another": ({"users_id": [], "items_id": ["a"]}, "'items_id' has 1 values, but 'users_id' has 0"),
}


@pytest.mark.parametrize(("entities", "message"), WRONG_ENTITIES.values(), ids=WRONG_ENTITIES.keys())
def test_entities_that_do_not_fit_are_refused(store: FeatureStore, entities: Mapping[str, Any], message: str) -> None:
    with pytest.raises(LookupInvalid, match=message):
        store.lookup(["users:text"], entities)


@pytest.mark.parametrize("key", [1, 1.5, b"item-1", True, "\ud800", [b"item-1"], np.array([b"item-1"])])
def test_string_keys_of_another_type_are_refused(store: FeatureStore, key: Any) -> None:
    with pytest.raises(LookupInvalid, match="'items_id' must be string"):
        store.lookup(["items:text"], {"items_id": key})


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        (["nowhere:text"], UnknownFeature, "no view 'nowhere'; it has counts, empty, items, recent, users"),
        (["nowhere:*"], UnknownFeature, "no view 'nowhere'"),
        (["users:nothing"], UnknownFeature, "view 'users' has no feature 'nothing'; it has score, text"),
        (["users:users_id"], UnknownFeature, "no feature 'users_id'"),
        ("no service", UnknownFeature, "no feature service 'no service'; it has all, ranking"),
        ("users:text", UnknownFeature, "no feature service 'users:text'"),
        ([], LookupInvalid, "the request names no features"),
        (["text"], LookupInvalid, "'text' is not a feature reference"),
        (["users:"], LookupInvalid, "'users:' is not a feature reference"),
        ([":text"], LookupInvalid, "':text' is not a feature reference"),
        ([""], LookupInvalid, "'' is not a feature reference"),
        (["users:text:text"], UnknownFeature, "no feature 'text:text'"),
    ],
)
def test_features_that_are_not_there_are_refused(
    store: FeatureStore, features: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        store.lookup(features, {"users_id": 1})


def test_a_refused_request_leaves_the_store_as_it_was(store: FeatureStore) -> None:
    for _ in range(2):
        with pytest.raises(UnknownFeature):
            store.lookup(["users:text", "users:nothing"], {"users_id": 1})
    assert store.lookup(["users:text"], {"users_id": 1}).to_pydict() == {"users:text": ["user 1"]}


# --- ages -----------------------------------------------------------------------------------------------------

RECENT_KEYS = ["young", "old", "old with null", "to come", "missing"]


def recent(store: FeatureStore, **options: Any) -> LookupResult:
    return store.lookup(["recent:clicks", "recent:text"], {"recent_id": RECENT_KEYS}, **options)


def test_rows_beyond_the_ttl_are_null_and_say_so(store: FeatureStore) -> None:
    result = recent(store)
    assert result.to_pydict() == {
        "recent:clicks": [1, None, None, 4, None],
        "recent:text": ["y", None, None, "t", None],
    }
    assert result.views["recent"].status.tolist() == [PRESENT, TOO_OLD, TOO_OLD, PRESENT, NOT_FOUND]
    assert result["recent:clicks"].status.tolist() == [PRESENT, TOO_OLD, TOO_OLD, PRESENT, NOT_FOUND]
    assert result["recent:text"].to_arrow().null_count == 3


def test_rows_beyond_the_ttl_are_served_on_request_and_still_say_so(store: FeatureStore) -> None:
    result = recent(store, stale="serve")
    assert result.to_pydict() == {"recent:clicks": [1, 2, None, 4, None], "recent:text": ["y", "o", "n", "t", None]}
    assert result["recent:clicks"].status.tolist() == [PRESENT, TOO_OLD, TOO_OLD, PRESENT, NOT_FOUND]


def test_rows_beyond_the_ttl_fail_the_lookup_on_request(store: FeatureStore) -> None:
    with pytest.raises(StaleFeatures, match="2 of 5 rows of view 'recent' are older than the accepted age"):
        recent(store, stale="fail")
    assert recent(store, stale="fail", max_age=3 * HOUR).to_pydict()["recent:clicks"] == [1, 2, None, 4, None]


@pytest.mark.parametrize(
    ("max_age", "expected"),
    [
        (HOUR / 4, [TOO_OLD, TOO_OLD, TOO_OLD, PRESENT, NOT_FOUND]),
        (HOUR, [PRESENT, TOO_OLD, TOO_OLD, PRESENT, NOT_FOUND]),
        (3 * HOUR, [PRESENT, PRESENT, PRESENT, PRESENT, NOT_FOUND]),
        (timedelta.max, [PRESENT, PRESENT, PRESENT, PRESENT, NOT_FOUND]),
        (timedelta(0), [TOO_OLD, TOO_OLD, TOO_OLD, PRESENT, NOT_FOUND]),
    ],
)
def test_the_age_asked_for_goes_before_the_ttl(store: FeatureStore, max_age: timedelta, expected: list[Status]) -> None:
    assert recent(store, max_age=max_age).views["recent"].status.tolist() == expected


def test_a_row_of_exactly_the_age_accepted_is_accepted(store: FeatureStore) -> None:
    instant = (NOW - 2 * HOUR - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    for late, status in ((0, PRESENT), (1, TOO_OLD)):
        now = instant + HOUR // timedelta(microseconds=1) + late
        result = lookup(store.version(), ["recent:clicks"], {"recent_id": "old"}, now=now)
        assert result.views["recent"].status.tolist() == [status]


def test_a_view_without_a_ttl_has_rows_of_any_age_unless_asked(store: FeatureStore) -> None:
    entities: dict[str, Any] = {"users_id": [1, 999]}
    assert store.lookup(["users:score"], entities).views["users"].status.tolist() == [PRESENT, NOT_FOUND]
    aged = store.lookup(["users:score"], entities, max_age=HOUR)
    assert aged.views["users"].status.tolist() == [TOO_OLD, NOT_FOUND]
    assert aged.to_pydict() == {"users:score": [None, None]}


def test_an_unknown_way_with_stale_rows_is_refused(store: FeatureStore) -> None:
    with pytest.raises(LookupInvalid, match="stale is 'drop'; it must be one of serve, null, fail"):
        recent(store, stale="drop")


# --- as a matrix ----------------------------------------------------------------------------------------------

NUMBERS = ["flag", "small", "large", "single", "double", "at", "vector"]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, "f4", "float64"])
def test_a_matrix_has_the_features_side_by_side(store: FeatureStore, dtype: Any) -> None:
    asked = [*ITEM_KEYS, "missing"]
    matrix = store.lookup([f"items:{name}" for name in NUMBERS], {"items_id": asked}).to_numpy(dtype)
    expected = [[number for name in NUMBERS for number in _numbers(row, name)] for row in [*ITEM_ROWS, {}]]
    assert matrix.shape == (len(asked), 9)
    assert matrix.dtype == np.dtype(dtype)
    # A timestamp is converted to the matrix's type and then divided, so it may be rounded twice.
    np.testing.assert_allclose(matrix, np.array(expected).astype(dtype), rtol=1e-6 if matrix.itemsize == 4 else 0)


def test_a_matrix_of_float32_alone_is_the_same_matrix(store: FeatureStore) -> None:
    names = ["items:single", "users:score", "items:single"]
    entities: dict[str, Any] = {"items_id": [*ITEM_KEYS, "missing"], "users_id": 3}
    mixed = store.lookup(names, entities).to_numpy()
    alone = store.lookup(["items:single"], entities).to_numpy()
    np.testing.assert_array_equal(mixed[:, :1], alone)
    np.testing.assert_array_equal(mixed[:, 2:], alone)
    assert alone.flags.c_contiguous
    assert alone.flags.writeable


@pytest.mark.parametrize("name", ["text", "blob", "integers", "floats", "words"])
def test_a_feature_of_no_fixed_width_has_no_matrix(store: FeatureStore, name: str) -> None:
    with pytest.raises(LookupInvalid, match=f"items:{name} is .*, not of fixed width"):
        store.lookup(["items:single", f"items:{name}"], {"items_id": ITEM_KEYS}).to_numpy()


@pytest.mark.parametrize("dtype", [np.int64, np.bool_, object])
def test_a_matrix_without_nan_is_refused(store: FeatureStore, dtype: Any) -> None:
    with pytest.raises(LookupInvalid, match="ask for a float type"):
        store.lookup(["items:small"], {"items_id": ITEM_KEYS}).to_numpy(dtype)


def _numbers(row: Mapping[str, Any], name: str) -> Iterator[float]:
    value = row.get(name)
    if name == "vector":
        yield from np.array([np.nan] * 3 if value is None else value, np.float32)
    elif value is None:
        yield np.nan
    elif isinstance(value, datetime):
        yield ((value - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)) / 1e6
    else:
        yield value


def _plain_columns(batch: pa.RecordBatch) -> list[Any]:
    return [plain(column.to_pylist()) for column in batch.columns]
