"""The bytes of a segment: the fields of a row do not overlap, and a damaged header is detected."""

import itertools
import struct
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.engine.base.errors import StoreDamaged
from shoal.engine.format.layout import (
    CHECKSUM_OFFSET,
    FIRST_FEATURE_BIT,
    HEADER_SIZE,
    ROW_PRESENCE,
    ChunkHeader,
    RowLayout,
    section_start,
    width_of,
)
from shoal.engine.format.schema import SCALAR_TYPES
from tests.stores import schema

TYPES = st.sampled_from([*SCALAR_TYPES, "float32[1]", "float32[3]", "float32[64]"])
HEADER = ChunkHeader(
    stride=40,
    rows=100,
    min_hash=-(2**63),
    max_hash=2**63 - 1,
    shift=60,
    buckets=16,
    hashes=176,
    row_data=1000,
    key_offsets=5040,
    origins=0,
    directory=5488,
    heap=5616,
    keys=6000,
    total=8192,
    checksum=2**64 - 1,
)


@given(st.lists(TYPES, min_size=1, max_size=40))
def test_fields_lie_side_by_side_and_aligned(types: list[str]) -> None:
    features: dict[str, Any] = {f"f{number}": of for number, of in enumerate(types)}
    layout = RowLayout(schema("doc", **features))
    taken = [(0, ROW_PRESENCE + (len(types) + FIRST_FEATURE_BIT + 7) // 8)]
    for of, offset in zip(types, layout.offsets, strict=True):
        width = width_of(of)
        assert offset % (4 if of.startswith("float32[") else width) == 0
        taken.append((offset, offset + width))
    taken.sort()
    assert all(left[1] <= right[0] for left, right in itertools.pairwise(taken))
    assert taken[-1][1] <= layout.stride
    assert layout.stride % 8 == 0


def test_a_row_wastes_less_than_eight_bytes_at_its_end_and_at_each_change_of_width() -> None:
    layout = RowLayout(schema("doc", a="bool", b="int64", c="float32", d="string", e="bool"))
    assert layout.offsets == (17, 24, 20, 32, 18)
    assert layout.stride == 40


def test_a_header_survives_packing() -> None:
    packed = HEADER.pack()
    assert len(packed) == HEADER_SIZE
    assert packed[CHECKSUM_OFFSET : CHECKSUM_OFFSET + 8] == b"\xff" * 8
    assert ChunkHeader.unpack(packed.ljust(HEADER.total, b"\0"), "it") == HEADER


@pytest.mark.parametrize("size", [0, 1, HEADER_SIZE - 1])
def test_a_value_too_short_for_a_header_is_damaged(size: int) -> None:
    with pytest.raises(StoreDamaged, match=f"the chunk has {size} bytes"):
        ChunkHeader.unpack(HEADER.pack()[:size], "the chunk")


@pytest.mark.parametrize(("position", "content"), [(0, b"X"), (8, struct.pack("<I", 1))])
def test_what_is_no_chunk_of_this_format_is_damaged(position: int, content: bytes) -> None:
    packed = bytearray(HEADER.pack().ljust(HEADER.total, b"\0"))
    packed[position : position + len(content)] = content
    with pytest.raises(StoreDamaged, match="expected b'SHOALSEG' version 2"):
        ChunkHeader.unpack(bytes(packed), "the chunk")


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 0},
        {"rows": 2**60},
        {"stride": 2**31},
        {"hashes": 8192},
        {"row_data": 8000},
        {"key_offsets": 7900},
        {"origins": 8100},
        {"directory": 8130},
        {"heap": 8193},
        {"keys": 2**63},
        {"total": 8193},
        {"total": 5000},
        {"buckets": 15},
        {"buckets": 2**31},
        {"shift": 59},
        {"shift": 64},
        {"shift": 2**31},
        {"min_hash": 1, "max_hash": 0},
    ],
    ids=str,
)
def test_a_header_that_points_outside_its_chunk_is_damaged(change: dict[str, int]) -> None:
    packed = replace(HEADER, **change).pack().ljust(8192, b"\0")
    with pytest.raises(StoreDamaged):
        ChunkHeader.unpack(packed, "the chunk")


@given(st.data())
def test_whatever_a_damaged_header_says_its_sections_lie_in_the_chunk(data: st.DataObject) -> None:
    packed = bytearray(HEADER.pack().ljust(HEADER.total, b"\0"))
    for position in data.draw(st.lists(st.integers(12, CHECKSUM_OFFSET - 1), min_size=1, max_size=4)):
        packed[position] = data.draw(st.integers(0, 255))
    try:
        header = ChunkHeader.unpack(bytes(packed), "the chunk")
    except StoreDamaged:
        return
    assert all(getattr(header, field.name) >= 0 for field in fields(header) if not field.name.endswith("_hash"))
    assert header.hashes + 8 * header.rows <= len(packed)
    assert header.row_data + header.stride * header.rows <= len(packed)
    assert header.directory + 4 * (header.buckets + 1) <= len(packed)
    assert (header.max_hash - header.min_hash) >> header.shift < header.buckets
    assert header.shift < 64


@given(st.integers(0, 2**40))
def test_sections_begin_where_cache_lines_begin_in_the_map(position: int) -> None:
    start = section_start(position)
    assert position <= start < position + 64
    assert (start + 16) % 64 == 0
