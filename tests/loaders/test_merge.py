"""A merge contains the newest row of every key under the newest schema, exactly as a lookup in its parts finds them."""

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engine.format.catalog import Origin
from shoal.engine.format.layout import ROW_PRESENCE, TOMBSTONE, RowLayout
from shoal.engine.format.schema import ViewSchema
from shoal.engine.kernels.gathering import NO_EVENT_TIME
from shoal.engine.lookup.columns import read_columns
from shoal.engine.store.segment import Chunk, Segment
from shoal.loaders.segments.arrow_rows import encode
from shoal.loaders.segments.merge import MAX_ORIGINS, Fate, Fates, Merge
from shoal.loaders.segments.segment_writer import ChunkBuilder
from tests.engine.segments import Identity, batch, record, segment, version
from tests.engine.values import VALUES, plain
from tests.stores import NOW, Row, schema

LEAST = -(2**63)
GREATEST = 2**63 - 1
VIEW = schema("doc", key="int64", a="int64", text="string")
IDENTITIES = st.one_of(
    st.tuples(st.integers(-3, 3), st.integers(-2, 2)),
    st.tuples(st.sampled_from([LEAST, LEAST + 1, -1, 0, GREATEST]), st.sampled_from([LEAST, 0, GREATEST])),
)
HISTORIES = [(of,) for of in VALUES] + [("int32", "int64"), ("int32", "float64"), ("float32", "float64")]


@st.composite
def runs(draw: st.DrawFn) -> tuple[ViewSchema, list[tuple[ViewSchema, dict[Identity, Row | None], list[int]]]]:
    """Draw segments of one view, newest first, with the places where they are cut into chunks."""
    histories = draw(st.lists(st.sampled_from(HISTORIES), min_size=1, max_size=4))
    steps = [0] * len(histories)
    made = []
    for _ in range(draw(st.integers(1, 4))):
        steps = [draw(st.integers(step, len(history) - 1)) for step, history in zip(steps, histories, strict=True)]
        chosen = draw(st.lists(st.sampled_from(range(len(histories))), min_size=1, unique=True))
        features: dict[str, Any] = {f"f{index}": histories[index][steps[index]] for index in chosen}
        row = st.fixed_dictionaries(
            {"doc_id": st.integers(0, 9)} | {name: st.none() | VALUES[of] for name, of in features.items()}
        )
        rows = draw(st.dictionaries(IDENTITIES, st.none() | row, max_size=20))
        made.append((schema("doc", key="int64", **features), rows, draw(st.lists(st.integers(-3, 3), max_size=2))))
    return made[-1][0], made[::-1]


def _by_hash(fates: tuple[Fate, Fate, Fate]) -> Fates:
    return lambda first, address: np.array(fates, np.uint8)[first % 3]


def _of_the_living(first: npt.NDArray[np.int64], address: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """Return the Fate of each row: LEFT_OUT for a tombstone, KEPT for others."""
    states = [ctypes.c_uint8.from_address(int(at) + ROW_PRESENCE).value for at in address]
    return np.array([Fate.LEFT_OUT if state & TOMBSTONE else Fate.KEPT for state in states], np.uint8)


@settings(max_examples=150, deadline=None)
@given(runs(), st.none() | st.tuples(*[st.sampled_from(Fate)] * 3), st.integers(1, 2000))
def test_a_merge_holds_what_its_parts_hold_together(
    content: tuple[ViewSchema, list[tuple[ViewSchema, dict[Identity, Row | None], list[int]]]],
    fates: tuple[Fate, Fate, Fate] | None,
    chunk_bytes: int,
) -> None:
    view, parts = content
    segments = [segment(of, rows, cuts=cuts, seq=9 - n) for n, (of, rows, cuts) in enumerate(parts)]
    segments = [part for part in segments if part.chunks]
    if not segments:
        return
    merge = Merge(segments, view, fates=_by_hash(fates) if fates else None)
    merged = _finished(view, merge, chunk_bytes)
    newest: dict[Identity, Row | None] = {}
    for _, rows, _ in parts:
        newest = rows | newest
    if fates:
        newest = {of: row for of, row in newest.items() if fates[of[0] % 3] is not Fate.LEFT_OUT}
        segments = [segment(view, {of: None for of in newest if fates[of[0] % 3] is Fate.BURIED}), *segments]
        segments = [part for part in segments if part.chunks]
        newest = {of: None if fates[of[0] % 3] is Fate.BURIED else row for of, row in newest.items()}
    assert _identities(merged) == sorted(newest)
    for chunk in merged.chunks:
        chunk.verify()
    if merged.chunks:
        assert _rows(view, [merged]) == _rows(view, segments, sorted(newest))
        assert _keys(merged) == [_key(newest[identity]) for identity in sorted(newest)]


@pytest.mark.parametrize("chunk_bytes", [1, 100, 1000, 10**9])
def test_chunks_never_split_rows_of_one_hash(chunk_bytes: int) -> None:
    rows: dict[Identity, Row | None] = {
        (first, second): {"doc_id": 1} for first in (LEAST, 2, GREATEST) for second in range(50)
    }
    merged = _finished(VIEW, Merge([segment(VIEW, rows)], VIEW), chunk_bytes)
    assert _identities(merged) == sorted(rows)
    assert [chunk.header.rows for chunk in merged.chunks] == ([50, 50, 50] if chunk_bytes < 5000 else [150])


def test_chunks_are_cut_by_the_bytes_of_their_values_too() -> None:
    rows: dict[Identity, Row | None] = {
        (number * 2**50, 0): {"doc_id": 1, "a": 1, "text": "x" * 1000} for number in range(400)
    }
    merged = _finished(VIEW, Merge([segment(VIEW, rows)], VIEW), 64 << 10)
    assert _identities(merged) == sorted(rows)
    assert 5 < len(merged.chunks) < 10


def test_rows_keep_the_origin_that_wrote_them() -> None:
    old = segment(VIEW, {(n, 0): {"doc_id": n} for n in range(10)}, seq=3)
    middle = segment(VIEW, {(n, 0): {"doc_id": n} for n in range(5, 8)}, seq=5)
    first = _finished(VIEW, Merge([middle, old], VIEW), 10**9, seq=5)
    newest = segment(VIEW, {(n, 0): None for n in (0, 6)}, seq=7)
    both = _finished(VIEW, Merge([newest, first], VIEW), 200, seq=7)
    origins = [
        both.record.origins[chunk.origin_of(row)].seq for chunk in both.chunks for row in range(chunk.header.rows)
    ]
    assert origins == [7, 3, 3, 3, 3, 5, 7, 5, 3, 3]


def test_the_oldest_origins_become_one_when_there_are_too_many() -> None:
    segments = [segment(VIEW, {(0, 0): {"doc_id": 0}}, seq=1)]
    origins = tuple(Origin(kind="delta", seq=seq, id=f"{seq:032x}") for seq in range(1, MAX_ORIGINS + 51))
    rows: dict[Identity, Row | None] = {(seq, 0): {"doc_id": seq} for seq in range(1, MAX_ORIGINS + 51)}
    builder = ChunkBuilder(RowLayout(VIEW), len(rows), with_origins=True)
    encode(builder, 0, batch(VIEW, rows))
    builder.origins[:] = np.arange(len(rows))
    chunk = Chunk(builder.finish().data, "it")
    many = Segment(record(VIEW, rows.values(), [chunk], 1).model_copy(update={"origins": origins}), [chunk])
    merged = _finished(VIEW, Merge([many, *segments], VIEW), 10**9)
    assert len(merged.record.origins) == MAX_ORIGINS
    of = [merged.record.origins[merged.chunks[0].origin_of(row)].seq for row in range(merged.chunks[0].header.rows)]
    assert of[-1] == MAX_ORIGINS + 50
    assert of[1:51] == [51] * 50
    assert of[51:] == list(range(51, MAX_ORIGINS + 51))


def test_event_times_survive_a_merge() -> None:
    times = {(n, 0): NOW.replace(year=2000 + n) for n in range(1, 20)}
    rows: dict[Identity, Row | None] = {
        identity: {"doc_id": 1, "event_timestamp": at} for identity, at in times.items()
    }
    merged = _finished(
        VIEW, Merge([segment(VIEW, {(3, 1): None}), segment(VIEW, rows)], VIEW, fates=_of_the_living), 99
    )
    stored = [int(row[8:16].copy().view(np.int64)[0]) for chunk in merged.chunks for row in chunk.rows]
    assert [NOW.fromtimestamp(micros / 1e6, NOW.tzinfo) for micros in stored] == list(times.values())


def test_a_merge_in_which_nothing_is_left_has_no_chunks() -> None:
    dead = segment(VIEW, {(1, 1): None, (2, 2): None})
    alive = segment(VIEW, {(2, 2): {"doc_id": 2}})
    assert _finished(VIEW, Merge([dead, alive], VIEW, fates=_of_the_living), 100).chunks == []


def _finished(view: ViewSchema, merge: Merge, chunk_bytes: int, *, seq: int = 1) -> Segment:
    builders: list[ChunkBuilder] = list(merge.chunks(chunk_bytes))
    chunks = [Chunk(builder.finish().data, "merged") for builder in builders]
    rows = sum(chunk.header.rows for chunk in chunks)
    update = {"origins": merge.origins, "rows": rows, "tombstones": 0}
    return Segment(record(view, [], chunks, seq).model_copy(update=update), chunks)


def _identities(part: Segment) -> list[Identity]:
    return [
        (int(first), int(row[:8].copy().view(np.int64)[0]))
        for chunk in part.chunks
        for first, row in zip(chunk.hashes, chunk.rows, strict=True)
    ]


def _keys(part: Segment) -> list[bytes]:
    return [chunk.key_of(row) for chunk in part.chunks for row in range(chunk.header.rows)]


def _key(row: Row | None) -> bytes:
    return b"" if row is None else int(row["doc_id"]).to_bytes(8, "little")


def _rows(view: ViewSchema, segments: Sequence[Segment], identities: Sequence[Identity] = ()) -> list[Any]:
    """Return the result of a lookup of all rows, or of the given ones."""
    at_version = version(view, segments).view("doc")
    wanted = list(identities) or _identities(segments[0])
    first = np.array([first for first, _ in wanted], np.int64)
    second = np.array([second for _, second in wanted], np.int64)
    names = tuple(feature.name for feature in view.features)
    read = read_columns(at_version, names, np.stack([first, second]), oldest=NO_EVENT_TIME, stale="serve")
    values = [[plain(value) for value in column.to_arrow().to_pylist()] for column in read.columns]
    return [read.rows.status.tolist(), read.rows.event_time.tolist(), *values]
