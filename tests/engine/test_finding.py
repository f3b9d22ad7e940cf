"""The row that is found for a key is the newest segment's. Both hashes distinguish it from its neighbours."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engine.format.layout import SMALL_ROWS, RowLayout
from shoal.engine.kernels import finding
from shoal.engine.store.segment import Segment, chunk_table
from tests.engine.segments import Identity, segment
from tests.stores import Row, schema

LEAST = -(2**63)
GREATEST = 2**63 - 1
VIEW = schema("doc", key="int64", a="int32")
NARROW = st.tuples(st.integers(-2, 2), st.integers(-3, 3))
EXTREME = st.tuples(
    st.sampled_from([LEAST, LEAST + 1, -1, 0, 1, GREATEST - 1, GREATEST]), st.sampled_from([LEAST, 0, GREATEST])
)
WIDE = st.tuples(st.integers(LEAST, GREATEST), st.integers(LEAST, GREATEST))
CONTENT = st.sampled_from([NARROW, EXTREME, WIDE]).flatmap(
    lambda identities: st.lists(
        st.tuples(
            st.dictionaries(identities, st.one_of(st.none(), st.integers(0, 1000)), max_size=40),
            st.lists(identities.map(lambda identity: identity[0]), max_size=3),
        ),
        min_size=1,
        max_size=6,
    )
)


def make_segments(content: Sequence[tuple[Mapping[Identity, int | None], Sequence[int]]]) -> list[Segment]:
    segments = []
    for values, cuts in content:
        rows: dict[Identity, Row | None] = {
            identity: None if value is None else {"doc_id": 0, "a": value} for identity, value in values.items()
        }
        segments.append(segment(VIEW, rows, cuts=cuts))
    return segments


def find(segments: Sequence[Segment], identities: Sequence[Identity]) -> list[tuple[int, int | None] | None]:
    """Return, for each identity, the number of the segment that has its row, and the row's value; None if there is no
    row. The value of a tombstone is None."""
    first = np.array([first for first, _ in identities], np.int64)
    second = np.array([second for _, second in identities], np.int64)
    address = np.full(first.size, 77, np.int64)
    chunk_of = np.full(first.size, 2**40, np.int64)
    chunks, starts = chunk_table(segments)
    finding.find(first, second, chunks, starts, address, chunk_of)
    return [_read(segments, chunks.tolist(), int(at), int(chunk)) for at, chunk in zip(address, chunk_of, strict=True)]


def _read(
    segments: Sequence[Segment], chunks: list[list[int]], address: int, chunk_number: int
) -> tuple[int, int | None] | None:
    assert -1 <= chunk_number < len(chunks)
    if address == finding.NOT_FOUND:
        return None
    position = chunks[chunk_number][finding.SEGMENT]
    chunk = [chunk for other in segments for chunk in other.chunks][chunk_number]
    row = chunk.rows[chunk.row_at(address)]
    if row[16] & 1:
        return position, None
    offset = RowLayout(VIEW).offsets[0]
    return position, int(row[offset : offset + 4].copy().view(np.int32)[0])


@settings(max_examples=150)
@given(CONTENT, st.data())
def test_the_newest_segment_that_has_a_key_wins(
    content: list[tuple[dict[Identity, int | None], list[int]]], data: st.DataObject
) -> None:
    known = [identity for values, _ in content for identity in values]
    others = data.draw(st.lists(st.one_of(NARROW, EXTREME, WIDE), max_size=20))
    asked = data.draw(st.permutations([*known, *others]))
    expected: list[tuple[int, int | None] | None] = []
    for identity in asked:
        having = [number for number, (values, _) in enumerate(content) if identity in values]
        expected.append((having[0], content[having[0]][0][identity]) if having else None)
    assert find(make_segments(content), asked) == expected


@pytest.mark.parametrize("keys", [0, 1, 63, 64, 65, 128, 1000])
def test_blocks_of_keys_do_not_disturb_each_other(keys: int) -> None:
    values = {(number * 1000, number): number for number in range(0, keys, 3)}
    asked = [(number * 1000, number) for number in range(keys)]
    expected = [(0, number) if number % 3 == 0 else None for number in range(keys)]
    assert find(make_segments([(values, [5000])]), asked) == expected


def test_a_chunk_too_large_for_the_caches_is_found_in_as_well() -> None:
    random = np.random.default_rng(3).integers(LEAST, GREATEST, 2 * SMALL_ROWS).tolist()
    values: dict[Identity, int | None] = {(first, 0): number for number, first in enumerate(random[::2])}
    assert len(values) == SMALL_ROWS
    values |= {(random[0], second): -second for second in range(1, 20)}
    asked = [*list(values)[::50], *list(values)[-19:], *((first, 0) for first in random[1::101]), (random[0], 20)]
    expected = [(0, values[identity]) if identity in values else None for identity in asked]
    assert find(make_segments([(values, [])]), asked) == expected


def test_rows_that_share_a_first_hash_are_told_apart_by_the_second() -> None:
    values = {(7, second): second for second in range(-500, 500)}
    asked = [(7, second) for second in range(-510, 510)]
    found = find(make_segments([(values, [])]), asked)
    assert found == [(0, second) if -500 <= second < 500 else None for _, second in asked]


def test_a_shared_first_hash_does_not_hide_an_older_segments_row() -> None:
    newer = {(7, 1): 10, (7, 3): 30}
    older = {(7, 2): 20, (7, 1): 99}
    assert find(make_segments([(newer, []), (older, [])]), [(7, 2), (7, 1), (7, 3), (7, 4)]) == [
        (1, 20),
        (0, 10),
        (0, 30),
        None,
    ]


def test_the_same_key_may_be_asked_for_many_times() -> None:
    assert find(make_segments([({(7, 1): 10}, [])]), [(7, 1)] * 200) == [(0, 10)] * 200


def test_a_hash_between_two_chunks_is_in_neither() -> None:
    found = find(make_segments([({(0, 0): 1, (10, 0): 2}, [10])]), [(-1, 0), (0, 0), (5, 0), (10, 0), (11, 0)])
    assert found == [None, (0, 1), None, (0, 2), None]


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_a_segment_without_rows_is_passed_over(empty: int) -> None:
    content: list[tuple[dict[Identity, int | None], list[int]]] = [({(7, 1): 10}, []), ({(7, 2): 20}, [])]
    content.insert(empty, ({}, []))
    found = find(make_segments(content), [(7, 1), (7, 2), (7, 3)])
    assert [value and value[1] for value in found] == [10, 20, None]


def test_nothing_is_found_where_there_are_no_rows() -> None:
    assert find(make_segments([({}, [])]), [(0, 0), (GREATEST, 1)]) == [None, None]
    assert find(make_segments([({}, []), ({}, [])]), [(0, 0)]) == [None]
