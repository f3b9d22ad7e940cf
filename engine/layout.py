"""The bytes of a segment: where a chunk's sections lie, and where a row's fields lie.

A segment is an immutable run of rows in the order of (first hash, second hash), cut into chunks; a chunk is one LMDB
value that is complete in itself. Readers (`engine.segment`) and writers (`loaders.segment_writer`) share this module
and nothing else. docs/segment-format.md shows the same byte by byte.
"""

import struct
from dataclasses import dataclass, fields
from enum import IntEnum
from functools import cache

from engine.errors import LOAD_AGAIN, StoreDamaged
from engine.schema import ViewSchema, embedding_size

MAGIC = b"SHOALSEG"
FORMAT_VERSION = 2

TOMBSTONE_BIT = 0
PUSHED_BIT = 1
FIRST_FEATURE_BIT = 2
"""The bits of a row's presence bitmap: whether it is a tombstone, whether it was pushed and comes from no entry of the
log, and for each feature whether it is not null."""
TOMBSTONE = 1 << TOMBSTONE_BIT
PUSHED = 1 << PUSHED_BIT
ROW_STATE = TOMBSTONE | PUSHED

ROW_SECOND_HASH = 0
ROW_EVENT_TIME = 8
ROW_PRESENCE = 16

OWN_AGE = 1 << 62
"""The bit of the event time's word that is inverted in a row whose age counts from its own event time, and never from
the low watermark of its view. Event times lie within the years 1 to 9999 and take 59 bits, so that the two highest bits
of a word are equal in all other rows."""


def is_own_age(word: int) -> bool:
    """Whether the word of an event time, as a signed integer, has the bit OWN_AGE inverted."""
    return bool((word >> 62 ^ word >> 63) & 1)


HEAP_LENGTH_BITS = 24
MAX_HEAP_VALUE = (1 << HEAP_LENGTH_BITS) - 1
"""The longest string, bytes or list value, in bytes; a heap reference is offset << 24 | length."""

ROWS_PER_BUCKET = 4
SMALL_ROWS = 1 << 16
"""A chunk of so few rows, as most overlays are, has half a megabyte of hashes, which stay in the caches."""
SPARSE_ROWS = 1 << 18
BUCKETS_PER_SPARSE_ROW = 4
"""A chunk of so few rows has a directory that is mostly empty: most of them are overlays, and most keys are looked for
in an overlay in vain."""

_SECTION_ALIGNMENT = 64
_VALUE_ALIGNMENT = 16
"""LMDB puts a value that fills pages of its own 16 bytes behind a page's start: sections that begin at 48 modulo 64
inside the value then begin cache lines. Speed alone depends on it."""


class Storage(IntEnum):
    """How a feature's value is held in a row."""

    BYTE = 0
    WORD_4 = 1
    WORD_8 = 2
    INLINE = 3
    HEAP = 4


_STORAGE = {
    "bool": Storage.BYTE,
    "int32": Storage.WORD_4,
    "float32": Storage.WORD_4,
    "int64": Storage.WORD_8,
    "float64": Storage.WORD_8,
    "timestamp": Storage.WORD_8,
}
_ITEM_WIDTHS = {"list<int64>": 8, "list<float32>": 4}
_WIDTH = {Storage.BYTE: 1, Storage.WORD_4: 4, Storage.WORD_8: 8, Storage.HEAP: 8}


def storage_of(feature_type: str) -> Storage:
    """How a feature of this type is held in a row."""
    return Storage.INLINE if embedding_size(feature_type) else _STORAGE.get(feature_type, Storage.HEAP)


def width_of(feature_type: str) -> int:
    """The bytes that a feature of this type takes in a row."""
    size = embedding_size(feature_type)
    return 4 * size if size else _WIDTH[storage_of(feature_type)]


def item_width(feature_type: str) -> int:
    """The bytes of which a value in the heap has a multiple: of those of numbers in a list, of one else."""
    return _ITEM_WIDTHS.get(feature_type, 1)


class RowLayout:
    """Where the fields of a view's rows lie.

    A row is: second hash (8 bytes), event time (int64 microseconds since 1970, 8 bytes), presence bitmap, then the
    features, narrow ones first so that each is aligned to its width, padded to a multiple of 8 bytes.
    """

    def __init__(self, schema: ViewSchema) -> None:
        self.schema = schema
        self.offsets, self.stride = _lay_out(tuple(feature.type for feature in schema.features))


@cache
def _lay_out(types: tuple[str, ...]) -> tuple[tuple[int, ...], int]:
    """Where features of these types lie in a row, and the row's length."""
    position = ROW_PRESENCE + (len(types) + FIRST_FEATURE_BIT + 7) // 8
    offsets = [0] * len(types)
    for alignment in (1, 4, 8):
        for index, of in enumerate(types):
            if _alignment(of) == alignment:
                position = _round_up(position, alignment)
                offsets[index] = position
                position += width_of(of)
    return tuple(offsets), _round_up(position, 8)


def _alignment(feature_type: str) -> int:
    return 4 if embedding_size(feature_type) else width_of(feature_type)


@dataclass(frozen=True)
class ChunkHeader:
    """The head of a chunk. Section members are byte offsets from the value's start; `origins` is 0 where all rows
    have the segment's first origin. `bucket(hash) = unsigned(hash - min_hash) >> shift` indexes the directory, which
    holds `buckets + 1` uint32 row numbers."""

    stride: int
    rows: int
    min_hash: int
    max_hash: int
    shift: int
    buckets: int
    hashes: int
    row_data: int
    key_offsets: int
    origins: int
    directory: int
    heap: int
    keys: int
    total: int
    checksum: int

    _STRUCT = struct.Struct("<8sIIQqqII9Q")

    def pack(self) -> bytes:
        """The header's bytes, `HEADER_SIZE` of them."""
        values = [getattr(self, field.name) for field in fields(self)]
        return self._STRUCT.pack(MAGIC, FORMAT_VERSION, *values).ljust(HEADER_SIZE, b"\0")

    @classmethod
    def stated_size(cls, head: bytes, origin: str) -> int:
        """The size in bytes that the head of a chunk states.

        Raises:
            StoreDamaged: it is not the head of a chunk, or of another format.
        """
        magic, version, *values = cls._STRUCT.unpack_from(head)
        if magic != MAGIC or version != FORMAT_VERSION:
            raise StoreDamaged(f"{origin} starts with {magic!r} version {version}, expected {MAGIC!r} {FORMAT_VERSION}")
        return int(values[-2])

    @classmethod
    def unpack(cls, value: "memoryview | bytes", origin: str) -> "ChunkHeader":
        """The header of a chunk whose sections were checked to lie inside it; `origin` names it in errors.

        Raises:
            StoreDamaged: it is not a chunk, is of another format, or its sections do not fit.
        """
        if len(value) < HEADER_SIZE:
            raise StoreDamaged(f"{origin} has {len(value)} bytes, a chunk has at least {HEADER_SIZE}; {LOAD_AGAIN}")
        magic, version, *values = cls._STRUCT.unpack_from(value)
        if magic != MAGIC or version != FORMAT_VERSION:
            raise StoreDamaged(
                f"{origin} starts with {magic!r} version {version}, expected {MAGIC!r} version {FORMAT_VERSION}; "
                f"{LOAD_AGAIN}"
            )
        header = cls(*values)
        header._check_sections(len(value), origin)
        return header

    def _check_sections(self, size: int, origin: str) -> None:
        needed = (
            (self.hashes, 8 * self.rows),
            (self.row_data, self.stride * self.rows),
            (self.key_offsets, 4 * (self.rows + 1)),
            (self.directory, 4 * (self.buckets + 1)),
            (self.origins, 2 * self.rows if self.origins else 0),
            (self.keys, 0),
        )
        fits = self.total <= size and all(start + length <= self.total for start, length in needed)
        if self.rows < 1 or self.heap > self.keys or not fits:
            raise StoreDamaged(f"{origin}: its sections do not fit into its {size} bytes; {LOAD_AGAIN}")
        hashes = self.max_hash - self.min_hash
        if hashes < 0 or self.shift > 63 or hashes >> self.shift >= self.buckets:
            raise StoreDamaged(f"{origin}: its directory does not span its hashes; {LOAD_AGAIN}")


HEADER_SIZE = 176
CHECKSUM_OFFSET = ChunkHeader._STRUCT.size - 8
"""The checksum, XXH3 (64 bits) of the whole chunk with this field as zero, is the header's last member."""


def section_start(position: int) -> int:
    """The first place at or behind `position` where a section may begin."""
    return _round_up(position + _VALUE_ALIGNMENT, _SECTION_ALIGNMENT) - _VALUE_ALIGNMENT


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def most_buckets(rows: int) -> int:
    """The most buckets that the directory of a chunk has; it has more than half as many.

    A bucket of a large chunk has as many hashes as a cache line.
    """
    return rows * BUCKETS_PER_SPARSE_ROW if rows <= SPARSE_ROWS else rows // ROWS_PER_BUCKET
