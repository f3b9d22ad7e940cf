"""Gathering returns every feature as it was written, for rows of any type, segment and schema."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shoal.engine.format.keys import key_identity
from shoal.engine.format.schema import WIDENINGS, ViewSchema, embedding_size
from shoal.engine.kernels.gathering import Status
from shoal.engine.lookup.columns import lookup
from shoal.engine.lookup.matrix import lookup_matrix
from shoal.engine.store.segment import matrix_width
from tests.engine.segments import Identity, segment, version
from tests.engine.values import VALUES, comparable, plain
from tests.stores import NOW, Row, schema

HISTORIES = [(of,) for of in VALUES] + [
    ("int32", "int64"),
    ("int32", "float64"),
    ("float32", "float64"),
    ("int32", "int64", "string"),
    ("string", "float32"),
    ("int64", "int32"),
    ("float32[3]", "float32[1]"),
]
"""The types that a feature has over time, oldest first. A step that is not a widening means a removal and a new feature
of the same name: older rows do not have it."""
KEYS = [f"key-{number}" for number in range(8)]


@dataclass(frozen=True)
class Layer:
    """The content of one segment: rows by key, None for a tombstone."""

    view: ViewSchema
    rows: dict[str, Row | None]


@st.composite
def layers(draw: st.DrawFn) -> list[Layer]:
    """Return segments of one view, newest first. Each may add, remove and widen features."""
    histories = draw(st.lists(st.sampled_from(HISTORIES), min_size=1, max_size=6))
    steps = [0] * len(histories)
    made = []
    for number in range(draw(st.integers(1, 4))):
        steps = [draw(st.integers(step, len(history) - 1)) for step, history in zip(steps, histories, strict=True)]
        chosen = draw(st.lists(st.sampled_from(range(len(histories))), min_size=1, unique=True))
        features: dict[str, Any] = {f"f{index}": histories[index][steps[index]] for index in chosen}
        view = schema("doc", **features)
        row = st.fixed_dictionaries({name: st.one_of(st.none(), VALUES[of]) for name, of in features.items()})
        living = row.map(lambda values: {"doc_id": "", **values})
        dead = st.none() if number else st.nothing()
        made.append(Layer(view, draw(st.dictionaries(st.sampled_from(KEYS), st.one_of(living, dead), max_size=8))))
    return made[::-1]


@settings(max_examples=150, deadline=None)
@given(layers())
def test_rows_of_any_segment_come_out_under_the_newest_schema(content: list[Layer]) -> None:
    view = content[0].view
    segments = [segment(layer.view, _by_identity(layer)) for layer in content]
    asked = [*KEYS, *KEYS[::-1], "no such key"]
    result = lookup(version(view, segments), ["doc:*"], {"doc_id": asked}, now=0)
    batch = result.to_arrow()
    batch.validate(full=True)
    rows = [_newest(content, key) for key in asked]
    statuses = result.views["doc"].status
    assert statuses.tolist() == [Status.NOT_FOUND if row is None else Status.PRESENT for row, _ in rows]
    for column, feature in zip(result.columns, view.features, strict=True):
        values = [_value(row, under, feature.name, feature.type) for row, under in rows]
        expected = comparable(values, feature.type)
        assert [plain(value) for value in column.to_arrow().to_pylist()] == expected
        assert column.nulls == values.count(None)
        _check_values(column.valid, _fixed_width(column), values)
    assert {name: [plain(value) for value in values] for name, values in result.to_pydict().items()} == {
        column.reference: [plain(value) for value in column.to_arrow().to_pylist()] for column in result.columns
    }


@settings(max_examples=100, deadline=None)
@given(layers())
def test_a_matrix_has_the_numbers_that_the_columns_have(content: list[Layer]) -> None:
    view = content[0].view
    numeric = [f"doc:{feature.name}" for feature in view.features if matrix_width(feature)]
    assume(numeric)
    at_version = version(view, [segment(layer.view, _by_identity(layer)) for layer in content])
    asked = [*KEYS, "no such key"]
    result = lookup_matrix(at_version, numeric, {"doc_id": asked}, now=0)
    columns = lookup(at_version, numeric, {"doc_id": asked}, now=0)
    np.testing.assert_array_equal(result.matrix, columns.to_numpy(result.matrix.dtype))
    np.testing.assert_array_equal(result.value_counts["doc"], columns.value_counts["doc"])


@pytest.mark.parametrize("of", VALUES)
@pytest.mark.parametrize("overlaid", [False, True])
def test_a_type_without_nulls_needs_no_validity(of: str, overlaid: bool) -> None:
    view = schema("doc", a=of)
    value = {"bool": True, "string": "x", "bytes": b"x", "timestamp": NOW, "list<string>": ["x"]}.get(of)
    size = embedding_size(of)
    value = [1.0] * size if size else ([1] if of.startswith("list") else 1) if value is None else value
    rows: dict[str, Row | None] = {key: {"doc_id": key, "a": value} for key in KEYS}
    layers = [Layer(view, rows), Layer(view, rows)] if overlaid else [Layer(view, rows)]
    segments = [segment(layer.view, _by_identity(layer)) for layer in layers]
    column = lookup(version(view, segments), ["doc:a"], {"doc_id": KEYS}, now=0).to_arrow().column(0)
    column.validate(full=True)
    assert column.null_count == 0
    assert column.buffers()[0] is None
    assert column.to_pylist() == [value] * len(KEYS)


def test_a_thousand_features_are_gathered() -> None:
    features: Any = {f"f{number}": ("float32", "int64", "bool", "string")[number % 4] for number in range(1000)}
    view = schema("doc", **features)
    row: Row = {"doc_id": "a"}
    for number in range(0, 1000, 3):
        row[f"f{number}"] = (float(number), number, True, str(number))[number % 4]
    found = lookup(version(view, [segment(view, {key_identity(["a"]): row})]), ["doc:*"], {"doc_id": ["a"]}, now=0)
    assert found.to_pydict() == {f"doc:f{number}": [row.get(f"f{number}")] for number in range(1000)}


@pytest.mark.parametrize("keys", [1, 7, 8, 9, 63, 64, 65, 1000])
def test_columns_of_any_length_do_not_run_into_each_other(keys: int) -> None:
    view = schema("doc", flag="bool", single="float32", double="float64", vector="float32[3]", words="list<string>")
    rows: dict[Identity, Row | None] = {}
    for number in range(keys):
        rows[key_identity([str(number)])] = {
            "flag": number % 2 == 0,
            "single": float(number),
            "double": -float(number),
            "vector": [number, number + 1, number + 2] if number % 5 else None,
            "words": [str(number)] * (number % 3),
        }
    asked = [str(number) for number in range(keys)]
    batch = lookup(version(view, [segment(view, rows)]), ["doc:*"], {"doc_id": asked}, now=0).to_arrow()
    batch.validate(full=True)
    assert batch.to_pylist() == [
        {f"doc:{name}": value for name, value in row.items()}
        for row in (rows[key_identity([key])] for key in asked)
        if row
    ]


def test_instants_of_the_far_past_and_future_survive() -> None:
    view = schema("doc", at="timestamp")
    instants = [datetime(1, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)]
    rows: dict[Identity, Row | None] = {key_identity([str(at)]): {"at": at, "event_timestamp": at} for at in instants}
    asked = [str(at) for at in instants]
    result = lookup(version(view, [segment(view, rows)]), ["doc:at"], {"doc_id": asked}, now=0)
    assert result.to_pydict() == {"doc:at": instants}
    assert result.views["doc"].event_timestamps.tolist() == [at.replace(tzinfo=None) for at in instants]


def _by_identity(layer: Layer) -> dict[Identity, Row | None]:
    return {key_identity([key]): row for key, row in layer.rows.items()}


def _newest(content: Sequence[Layer], key: str) -> tuple[Row | None, ViewSchema]:
    layer = next((layer for layer in content if key in layer.rows), content[0])
    return layer.rows.get(key), layer.view


def _value(row: Row | None, under: ViewSchema, name: str, of: str) -> Any:
    stored = {feature.name: feature.type for feature in under.features}.get(name)
    if row is None or stored is None or (stored != of and (stored, of) not in WIDENINGS):
        return None
    value = row.get(name)
    return float(value) if of == "float64" and value is not None else value


def _fixed_width(column: Any) -> Any:
    heap = column.feature.type in ("string", "bytes") or column.feature.type.startswith("list")
    return None if heap else column.values


def _check_values(valid: Any, values: Any, expected: list[Any]) -> None:
    """Assert that a missing value is NaN in a float column, and zero in any other column."""
    assert valid.tolist() == [int(value is not None) for value in expected]
    if values is None:
        return
    absent = values[valid == 0]
    if values.dtype.kind == "f":
        assert np.isnan(absent).all()
    else:
        assert not absent.view(np.uint8).any()
