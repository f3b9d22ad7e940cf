"""A chunk finds its rows with a directory that is correct for any set of hashes, and detects a flipped bit."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engine.base.errors import StoreDamaged
from shoal.engine.format.layout import (
    BUCKETS_PER_SPARSE_ROW,
    ROWS_PER_BUCKET,
    SPARSE_ROWS,
    RowLayout,
)
from shoal.engine.store.segment import Chunk
from shoal.loaders.segments.arrow_rows import encode
from shoal.loaders.segments.segment_writer import MIN_CHUNK_BYTES, ChunkBuilder
from tests.engine.segments import Identity, batch, sealed, segment
from tests.every_type import ITEMS, item_rows
from tests.stores import Row, schema

LEAST = -(2**63)
GREATEST = 2**63 - 1
VIEW = schema("doc", key="int64", a="int32")
HASHES = st.one_of(
    st.integers(LEAST, GREATEST),
    st.integers(-3, 3),
    st.sampled_from([LEAST, LEAST + 1, GREATEST - 1, GREATEST]),
    st.builds(lambda power, away: 2**power + away, st.integers(0, 62), st.integers(-2, 2)),
)
IDENTITIES = st.tuples(HASHES, st.integers(LEAST, GREATEST))
HASH_SETS = {
    "one row": [5],
    "one row at the least hash": [LEAST],
    "one row at the greatest hash": [GREATEST],
    "both ends": [LEAST, GREATEST],
    "all at one hash but one": [7] * 100 + [8],
    "all at one hash": [LEAST] * 50,
    "dense": list(range(-500, 500)),
    "dense at the least hash": list(range(LEAST, LEAST + 1000)),
    "dense at the greatest hash": list(range(GREATEST - 999, GREATEST + 1)),
    "dense, and one far away": [*range(1000), GREATEST],
    "a half of the range": [LEAST, 0],
    "one more than a half of the range": [LEAST, 1],
    "powers of two": [*(-(2**power) for power in range(64)), *(2**power for power in range(63))],
    "even": list(range(LEAST, GREATEST, 2**56)),
}


def rows_at(hashes: list[int]) -> dict[Identity, Row | None]:
    return {(first, second): {"doc_id": second} for second, first in enumerate(hashes)}


@pytest.mark.parametrize("hashes", HASH_SETS.values(), ids=HASH_SETS.keys())
def test_the_directory_bounds_the_rows_of_each_bucket(hashes: list[int]) -> None:
    chunk = Chunk(sealed(VIEW, rows_at(hashes)).data, "it")
    chunk.verify()
    _check_directory(chunk, sorted(hashes))


@given(st.lists(HASHES, min_size=1, max_size=200))
def test_the_directory_bounds_the_rows_of_each_bucket_whatever_the_hashes(hashes: list[int]) -> None:
    chunk = Chunk(sealed(VIEW, rows_at(hashes)).data, "it")
    chunk.verify()
    _check_directory(chunk, sorted(hashes))


@pytest.mark.parametrize(
    ("rows", "per_bucket"), [(1 << 16, 1 / BUCKETS_PER_SPARSE_ROW), (SPARSE_ROWS + 1, ROWS_PER_BUCKET)]
)
def test_a_bucket_has_a_cache_line_of_hashes_in_a_large_chunk_and_most_have_none_in_a_small(
    rows: int, per_bucket: float
) -> None:
    hashes: npt.NDArray[np.int64] = np.random.default_rng(1).integers(LEAST, GREATEST, rows)
    header = Chunk(sealed(VIEW, rows_at(hashes.tolist())).data, "it").header
    assert per_bucket <= header.rows / header.buckets <= 2 * per_bucket


def test_a_chunk_fills_pages_of_its_own() -> None:
    assert len(sealed(VIEW, {(1, 1): {"doc_id": 1}})) == MIN_CHUNK_BYTES


@settings(max_examples=30)
@given(st.data())
def test_a_turned_bit_anywhere_is_found(data: st.DataObject) -> None:
    value = _varied_chunk()
    position = data.draw(st.integers(0, 8 * value.size - 1))
    value[position // 8] ^= 1 << (position % 8)
    with pytest.raises(StoreDamaged):
        Chunk(value.data, "it").verify()


def test_a_turned_bit_is_found_in_every_byte_of_the_header() -> None:
    for position in range(176):
        value = _varied_chunk()
        value[position] ^= 0x10
        with pytest.raises(StoreDamaged):
            Chunk(value.data, "it").verify()


@given(st.integers(0, 4095))
def test_a_chunk_cut_short_is_found(size: int) -> None:
    with pytest.raises(StoreDamaged):
        Chunk(sealed(VIEW, {(1, 1): {"doc_id": 1}}).data[:size], "it").verify()


@pytest.mark.parametrize(
    ("hashes", "seconds"), [([1, 5, 3], [0, 0, 0]), ([1, 4, 4], [0, 2, 1]), ([1, 4, 4], [0, 2, 2])]
)
def test_rows_out_of_order_are_found(hashes: list[int], seconds: list[int]) -> None:
    rows: dict[Identity, Row | None] = {(number, second): {"doc_id": 1} for number, second in enumerate(seconds)}
    builder = ChunkBuilder(RowLayout(VIEW), 3, with_origins=False)
    encode(builder, 0, batch(VIEW, rows))
    builder.hashes[:] = hashes
    with pytest.raises(StoreDamaged, match="not sorted by their hashes"):
        Chunk(builder.finish().data, "it").verify()


def test_a_row_knows_its_key_and_where_it_stands() -> None:
    view = schema("doc", key="string", a="int32")
    rows: dict[Identity, Row | None] = {(1, 1): {"doc_id": "é"}, (2, 2): None, (3, 3): {"doc_id": ""}}
    chunk = segment(view, rows).chunks[0]
    assert [chunk.key_of(row) for row in range(3)] == [b"\x02\0\0\0\xc3\xa9", b"", b"\0\0\0\0"]
    address = chunk.address + chunk.header.row_data
    assert [chunk.row_at(address + row * chunk.header.stride) for row in range(3)] == [0, 1, 2]
    assert [chunk.origin_of(row) for row in range(3)] == [0, 0, 0]


def _varied_chunk() -> npt.NDArray[np.uint8]:
    """Return a chunk that has every section, with every type."""
    rows: dict[Identity, Row | None] = {(number, number): row for number, row in enumerate(item_rows(6))}
    builder = ChunkBuilder(RowLayout(ITEMS), len(rows), with_origins=True)
    encode(builder, 0, batch(ITEMS, rows))
    builder.origins[:] = np.arange(len(rows))
    return builder.finish().copy()


def _check_directory(chunk: Chunk, hashes: list[int]) -> None:
    header = chunk.header
    assert chunk.hashes.tolist() == hashes
    assert (header.min_hash, header.max_hash) == (hashes[0], hashes[-1])
    directory = chunk.section(header.directory, np.uint32, header.buckets + 1).tolist()
    assert directory[0] == 0
    assert directory[-1] == len(hashes)
    for row, first in enumerate(hashes):
        bucket = (first - header.min_hash) >> header.shift
        assert 0 <= bucket < header.buckets
        assert directory[bucket] <= row < directory[bucket + 1]
    directory_end = header.directory + 4 * (header.buckets + 1)
    assert directory_end <= header.heap
