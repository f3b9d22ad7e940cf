"""Flip bits in the chunks of a view and read all of it: `python -m tests.engine.turned_bits SEED EXAMPLES`.

Each example changes something in valid chunks. The chunks lie between pages without access, so a read beyond a chunk
ends the process. The last line of the output is the number of the current example.
"""

import ctypes
import mmap
import random
import struct
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shoal.engine.base.errors import StoreDamaged
from shoal.engine.encoders import arrow_stream, feast_protobuf, json_feast, json_lookup, npy
from shoal.engine.format.layout import HEADER_SIZE, ChunkHeader, RowLayout, ValueStorage, storage_of
from shoal.engine.kernels.hashing import key_hashes
from shoal.engine.lookup.columns import lookup
from shoal.engine.lookup.explain import StoredRow, _add_rows
from shoal.engine.lookup.key_columns import KeyColumns
from shoal.engine.lookup.matrix import lookup_matrix
from shoal.engine.store.segment import Chunk, Segment
from shoal.loaders.segments.merge import Merge
from shoal.loaders.segments.segment_writer import ChunkBuilder
from tests.engine import segments
from tests.every_type import ITEMS, item_rows

LAYOUT = RowLayout(ITEMS)
NUMBERS = [f"items:{name}" for name in ("single", "large", "vector", "at")]
HEAP_FIELDS = [
    offset
    for feature, offset in zip(ITEMS.features, LAYOUT.offsets, strict=True)
    if storage_of(feature.type) is ValueStorage.HEAP
]
PAGE = mmap.PAGESIZE
_PROT_NONE = 0


class Guarded:
    """The bytes of a chunk between two pages without access. They end just before the second page, or begin just after
    the first."""

    def __init__(self, content: bytes, *, at_end: bool) -> None:
        room = -(-len(content) // PAGE) * PAGE
        self._map = mmap.mmap(-1, room + 2 * PAGE)
        start = PAGE + room - len(content) if at_end else PAGE
        self._map[start : start + len(content)] = content
        self._whole = np.frombuffer(self._map, np.uint8)
        self.bytes = self._whole[start : start + len(content)]
        for page in (0, PAGE + room):
            self._protect(page, _PROT_NONE)

    def _protect(self, page: int, protection: int) -> None:
        address = self._whole.ctypes.data + page
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), protection) == 0


def change_header(source: random.Random, chunk: bytearray) -> None:
    header = ChunkHeader.unpack(bytes(chunk), "valid")
    name = source.choice([name for name in header.__dataclass_fields__ if name not in ("checksum",)])
    value = getattr(header, name)
    signed = name in ("min_hash", "max_hash")
    narrow = name in ("stride", "shift", "buckets")
    bits = 32 if narrow else 63 if signed else 64
    others = [0, 1, 2**bits - 1, value + 1, value - 1, value + 8, value * 2, len(chunk), source.randrange(2**bits)]
    lowest = -(2**63) if signed else 0
    changed = min(max(source.choice(others), lowest), 2**bits - 1)
    try:
        chunk[:HEADER_SIZE] = replace(header, **{name: changed}).pack()
    except struct.error:
        turn_bit(source, chunk, 0, HEADER_SIZE)


def turn_bit(source: random.Random, chunk: bytearray, start: int, end: int) -> None:
    if end > start:
        chunk[source.randrange(start, end)] ^= 1 << source.randrange(8)


def change_word(source: random.Random, chunk: bytearray, at: int, size: int) -> None:
    value = source.choice([0, 1, 2 ** (8 * size) - 1, 2 ** (8 * size - 1) - 1, len(chunk), source.randrange(2**62)])
    chunk[at : at + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")


def damage(source: random.Random, chunk: bytearray) -> None:
    """Change something in a valid chunk."""
    header = ChunkHeader.unpack(bytes(chunk), "valid")
    row = header.row_data + header.stride * source.randrange(header.rows)
    what = source.randrange(10)
    if what == 0:
        change_header(source, chunk)
    elif what == 1:
        change_word(source, chunk, header.directory + 4 * source.randrange(header.buckets + 1), 4)
    elif what == 2:
        change_word(source, chunk, header.hashes + 8 * source.randrange(header.rows), 8)
    elif what == 3:
        change_word(source, chunk, row + source.choice(HEAP_FIELDS), 8)
    elif what == 4:
        at = row + source.choice(HEAP_FIELDS)
        turn_bit(source, chunk, at, at + 8)
    elif what == 5:
        change_word(source, chunk, header.key_offsets + 4 * source.randrange(header.rows + 1), 4)
    elif what == 6:
        turn_bit(source, chunk, row, row + header.stride)
    elif what == 7 and header.keys > header.heap + 8:
        change_word(source, chunk, source.randrange(header.heap, header.keys - 4), 4)
    elif what == 8 and header.origins:
        change_word(source, chunk, header.origins + 2 * source.randrange(header.rows), 2)
    else:
        turn_bit(source, chunk, 0, len(chunk))


class Trial:
    """A base of two chunks and an overlay, which are valid. Each run damages copies of them."""

    def __init__(self) -> None:
        rows = item_rows(60)
        first, second = key_hashes([pa.array([row["items_id"] for row in rows])])
        identities = [*zip(first.tolist(), second.tolist(), strict=True)]
        by_identity = dict(zip(identities, rows, strict=True))
        self.keys = [row["items_id"] for row in rows] + ["none"]
        self.base = segments.segment(ITEMS, by_identity, cuts=[0])
        newer: dict[segments.Identity, Any] = {identity: by_identity[identity] for identity in identities[:20]}
        newer[identities[3]] = None
        self.overlay = segments.segment(ITEMS, newer, seq=2)
        self.outcomes: Counter[str] = Counter()

    def run(self, source: random.Random) -> None:
        contents = [bytearray(chunk.bytes) for segment in (self.overlay, self.base) for chunk in segment.chunks]
        for _ in range(source.choice([1, 1, 1, 2, 5])):
            damage_one = source.choice(contents)
            try:
                damage(source, damage_one)
            except StoreDamaged:
                continue  # The damaged header no longer says where to continue.
        guarded = [Guarded(bytes(content), at_end=source.random() < 0.7) for content in contents]
        self.note("open", lambda: self.read([part.bytes for part in guarded]))

    def note(self, what: str, attempt: Callable[[], object]) -> None:
        """Count the result of an attempt, which either succeeds or is refused as damaged data."""
        try:
            attempt()
            self.outcomes[f"{what} read"] += 1
        except StoreDamaged:
            self.outcomes[f"{what} refused"] += 1

    def read(self, contents: list[npt.NDArray[np.uint8]]) -> None:
        chunks = [Chunk(content.data, f"chunk {number}") for number, content in enumerate(contents)]
        parts = [Segment(self.overlay.record, chunks[:1]), Segment(self.base.record, chunks[1:])]
        version = segments.version(ITEMS, parts)
        asked = {"items_id": self.keys}
        for references in ([f"items:{feature.name}"] for feature in ITEMS.features):
            result = lookup(version, references, asked, now=0, stale="serve")
            self.note("json", partial(json_lookup.encode, result))
            self.note("feast", partial(json_feast.encode, result, asked, strict=True))
            arrow_stream.encode(result)
            feast_protobuf.encode(result, {})
        npy.encode(lookup_matrix(version, NUMBERS, asked, now=0, stale="serve"))
        self.note("merge", lambda: self.merge(parts))
        for part in parts:
            histories: list[list[StoredRow]] = [[] for _ in self.keys]
            alone = segments.version(ITEMS, [part]).view("items")
            self.note("explain", partial(_add_rows, histories, alone, KeyColumns(asked), "base"))

    def merge(self, parts: list[Segment]) -> None:
        for builder in Merge(parts, ITEMS).chunks(4096):
            assert isinstance(builder, ChunkBuilder)
            builder.finish()


def main() -> None:
    seed = int(sys.argv[1])
    examples = int(sys.argv[2])
    trial = Trial()
    for number in range(seed, seed + examples):
        print(f"example {number}", flush=True)
        trial.run(random.Random(number))
    print(dict(trial.outcomes), flush=True)


if __name__ == "__main__":
    main()
