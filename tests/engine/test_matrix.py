"""A matrix contains the same values as the columns of the same lookup, for any types, order and segments."""

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest

from shoal import FeatureStore
from shoal.engine.base.errors import LookupInvalid, StaleFeatures
from shoal.engine.kernels.gathering import Status
from shoal.engine.root.export_root import ExportRoot
from tests.stores import Row, load, publish_delta, publish_snapshot, schema

NUMBERS: Any = {"a": "float32", "b": "float32", "c": "float32", "flag": "bool", "e": "float32[3]"}
WIDE: Any = {"i": "int32", "l": "int64", "d": "float64", "t": "timestamp"}
KEYS = [f"d{number}" for number in range(60)]


def row(number: int, salt: float) -> Row:
    """Return a row with some nulls."""
    values = {
        "a": number + salt,
        "b": number / 3,
        "c": -number * salt,
        "flag": number % 2 == 0,
        "e": [number, salt, 0.5],
        "i": -number,
        "l": 2**40 + number,
        "d": number / 7,
        "t": datetime(2026, 1, 1, 0, 0, number, tzinfo=UTC),
        "s": "text",
    }
    absent = [] if number % 5 else [list(values)[number % 9]]
    return {"docs_id": f"d{number}"} | {name: value for name, value in values.items() if name not in absent}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """A store with a base of one schema, an overlay with a widened and an added feature, and tombstones."""
    directory = tmp_path_factory.mktemp("matrix")
    root = ExportRoot(directory / "root")
    narrow = schema("docs", **NUMBERS, **WIDE, s="string")
    wide = schema("docs", added="float32", **NUMBERS, **(WIDE | {"i": "int64"}), s="string")
    other = schema("more", x="float32", y="float32")
    publish_snapshot(root, narrow, [row(number, 0.25) for number in range(50)])
    changed = [row(number, 0.75) | {"added": 1.5} for number in range(10, 20)]
    publish_delta(root, wide, changed, [{"docs_id": "d3"}])
    publish_snapshot(root, other, [{"more_id": "m", "x": 1.0, "y": 2.0}])
    load(directory / "store", root)
    return FeatureStore.open(directory / "store")


@pytest.mark.parametrize(
    ("features", "dtype"),
    [
        (["a", "b", "c"], np.float32),
        (["b", "c"], np.float32),
        (["c", "a", "b"], np.float32),
        (["a", "a"], np.float32),
        (["a", "b", "c", "e"], np.float32),
        (["e", "flag", "added", "a"], np.float32),
        (["i", "l", "d", "t", "a", "flag", "e"], np.float64),
    ],
)
def test_a_matrix_holds_what_the_columns_hold(store: FeatureStore, features: list[str], dtype: type) -> None:
    asked = [f"docs:{name}" for name in features]
    matrix = store.lookup_matrix(asked, {"docs_id": KEYS})
    columns = store.lookup(asked, {"docs_id": KEYS})
    assert matrix.matrix.dtype == dtype
    np.testing.assert_array_equal(matrix.matrix, columns.to_numpy(dtype))
    assert matrix.matrix.shape[0] == len(KEYS)
    assert matrix.value_counts["docs"].tolist() == columns.value_counts["docs"].tolist()
    assert matrix.value_counts["docs"].sum() == len(KEYS) * len(features)
    np.testing.assert_array_equal(matrix.views["docs"].status, columns.views["docs"].status)


def test_features_of_several_views_stand_in_the_order_asked(store: FeatureStore) -> None:
    asked = ["docs:b", "more:y", "docs:a", "more:x"]
    result = store.lookup_matrix(asked, {"docs_id": KEYS, "more_id": "m"})
    columns = store.lookup(asked, {"docs_id": KEYS, "more_id": "m"})
    np.testing.assert_array_equal(result.matrix, columns.to_numpy())
    assert result.matrix[:, 1].tolist() == [2.0] * len(KEYS)


def test_no_keys_make_a_matrix_without_rows(store: FeatureStore) -> None:
    assert store.lookup_matrix(["docs:a", "docs:e"], {"docs_id": []}).matrix.shape == (0, 4)


def test_old_rows_are_absent_served_or_refused_as_asked(store: FeatureStore) -> None:
    second = timedelta(seconds=1)
    result = store.lookup_matrix(["docs:a"], {"docs_id": KEYS[:2]}, max_age=second)
    assert np.isnan(result.matrix).all()
    assert result.value_counts["docs"][Status.OUTSIDE_MAX_AGE] == 2
    served = store.lookup_matrix(["docs:b"], {"docs_id": KEYS[1:3]}, stale="serve", max_age=second)
    assert served.matrix[:, 0].tolist() == [np.float32(1 / 3), np.float32(2 / 3)]
    with pytest.raises(StaleFeatures):
        store.lookup_matrix(["docs:a"], {"docs_id": KEYS}, stale="fail", max_age=second)


def test_what_is_no_number_is_refused_by_name(store: FeatureStore) -> None:
    with pytest.raises(LookupInvalid, match="docs:s is string"):
        store.lookup_matrix(["docs:a", "docs:s"], {"docs_id": KEYS})
