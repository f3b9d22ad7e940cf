"""Encoding rows: the same rows give the same bytes, however they are split into batches and slices."""

import itertools
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engine.format.keys import key_identity
from shoal.engine.format.layout import RowLayout
from shoal.engine.format.schema import embedding_size
from shoal.engine.lookup.columns import lookup
from shoal.engine.store.segment import Chunk, Segment
from shoal.loaders.segments.arrow_rows import encode, published_schema
from shoal.loaders.segments.segment_writer import ChunkBuilder
from tests import stores
from tests.engine.segments import Identity, batch, record, version
from tests.engine.values import VALUES, comparable, plain

TYPES = list(VALUES)
FEATURES: dict[str, Any] = {f"f{number}": of for number, of in enumerate(TYPES)}
VIEW = stores.schema("doc", **FEATURES)
KEYS = [f"é{number}" for number in range(12)]
ROWS = st.lists(
    st.fixed_dictionaries({name: st.none() | VALUES[of] for name, of in FEATURES.items()}), min_size=12, max_size=12
)


@settings(max_examples=50)
@given(ROWS, st.lists(st.integers(0, 12), min_size=1, max_size=4))
def test_rows_are_encoded_alike_in_one_batch_or_in_slices(rows: list[stores.Row], cuts: list[int]) -> None:
    whole = _batch(rows)
    bounds = sorted({0, *cuts, 12})
    builder = ChunkBuilder(RowLayout(VIEW), 12, with_origins=False)
    for start, end in itertools.pairwise(bounds):
        encode(builder, start, whole.slice(start, end - start))
    chunk = Chunk(builder.finish().data, "it")
    chunk.verify()
    segment = Segment(record(VIEW, rows, [chunk], 1), [chunk])
    batch_found = lookup(version(VIEW, [segment]), ["doc:*"], {"doc_id": KEYS}, now=0).to_arrow()
    batch_found.validate(full=True)
    for name, of in FEATURES.items():
        found = [plain(value) for value in batch_found.column(f"doc:{name}").to_pylist()]
        assert found == comparable([row[name] for row in rows], of)
    keys = {chunk.key_of(row)[4:].decode() for row in range(12)}
    assert keys == set(KEYS)


def test_a_value_beneath_a_null_is_not_encoded() -> None:
    fixed = pa.array([[1.0, 2.0, 3.0], None], pa.list_(pa.float32(), 3)).cast(pa.list_(pa.float32()))
    assert fixed.values.null_count == 3
    rows: dict[Identity, stores.Row | None] = {(1, 1): {"doc_id": "a"}, (2, 2): {"doc_id": "b"}}
    view = stores.schema("doc", vector="float32[3]")
    plain_batch = batch(view, rows)
    with_vectors = plain_batch.set_column(plain_batch.schema.get_field_index("vector"), "vector", fixed)
    builder = ChunkBuilder(RowLayout(view), 2, with_origins=False)
    encode(builder, 0, with_vectors)
    assert Chunk(builder.finish().data, "it").header.rows == 2


def test_lists_of_a_slice_of_items_are_encoded_from_where_it_begins() -> None:
    view = stores.schema("doc", integers="list<int64>", floats="list<float32>", words="list<string>")
    items = {
        "integers": pa.array([9, 9, 1, 2, 3, 9], pa.int64()),
        "floats": pa.array([9, 9, 1, 2, 3, 9], pa.float32()),
        "words": pa.array(["nine", "nine", "a", "é", "ccc", "nine"]),
    }
    rows: dict[Identity, stores.Row | None] = {key_identity([key]): {"doc_id": key} for key in ("a", "b")}
    plain_batch = batch(view, rows)
    for name, values in items.items():
        lists = pa.ListArray.from_arrays(pa.array([0, 1, 3], pa.int32()), values.slice(2, 3))
        plain_batch = plain_batch.set_column(plain_batch.schema.get_field_index(name), name, lists)
    builder = ChunkBuilder(RowLayout(view), 2, with_origins=False)
    encode(builder, 0, plain_batch)
    chunk = Chunk(builder.finish().data, "it")
    segment = Segment(record(view, rows.values(), [chunk], 1), [chunk])
    keys = plain_batch.column("doc_id").to_pylist()
    found = lookup(version(view, [segment]), ["doc:*"], {"doc_id": keys}, now=0).to_pydict()
    assert found == {
        "doc:integers": [[1], [2, 3]],
        "doc:floats": [[1.0], [2.0, 3.0]],
        "doc:words": [["a"], ["é", "ccc"]],
    }


def test_values_of_a_tombstone_are_left_out() -> None:
    view = stores.schema("doc", a="int64", text="string")
    rows: dict[Identity, stores.Row | None] = {(1, 1): {"doc_id": "a", "a": 7, "text": "x" * 100}}
    dead = batch(view, rows)
    dead = dead.set_column(dead.schema.get_field_index("__tombstone"), "__tombstone", pa.array([True]))
    builder = ChunkBuilder(RowLayout(view), 1, with_origins=False)
    encode(builder, 0, dead)
    assert (builder.tombstones, builder.heap_size) == (1, 0)
    assert Chunk(builder.finish().data, "it").rows[0, 16] == 1


@pytest.mark.parametrize("delta", [False, True])
def test_published_files_have_the_columns_of_their_view(delta: bool) -> None:
    schema = published_schema(VIEW, delta=delta)
    head = ["__key_hash", "__key_hash_2", "__event_timestamp", *(["__tombstone"] if delta else []), "doc_id"]
    assert schema.names == head + list(FEATURES)
    assert all(pa.types.is_list(schema.field(name).type) for name, of in FEATURES.items() if embedding_size(of))


def _batch(rows: list[stores.Row]) -> pa.RecordBatch:
    by_identity: dict[Identity, stores.Row | None] = {
        key_identity([key]): {"doc_id": key, **row} for key, row in zip(KEYS, rows, strict=True)
    }
    return batch(VIEW, by_identity)
