"""The layout of a segment: the positions of a chunk's sections, and of a row's fields.

A segment is an immutable sequence of rows, sorted by (first hash, second hash), and divided into chunks. A chunk is one
LMDB value and refers to no other chunk. Readers (`shoal.engine.store.segment`) and writers
(`shoal.loaders.segments.segment_writer`) share only this module. docs/segment-format.md describes the layout byte by
byte.
"""

import struct
from dataclasses import dataclass, fields
from enum import IntEnum
from functools import cache

from shoal.engine.base.errors import LOAD_AGAIN, StoreDamaged
from shoal.engine.format.schema import ViewSchema, embedding_size

MAGIC = b"SHOALSEG"
FORMAT_VERSION = 2

TOMBSTONE_BIT = 0
PUSHED_BIT = 1
FIRST_FEATURE_BIT = 2
"""The bits of a row's presence bitmap. The first bit marks a tombstone, the second a pushed row (a row without an entry
of the log). After these two bits, there is one bit per feature: 1 if the feature is not null."""
TOMBSTONE = 1 << TOMBSTONE_BIT
PUSHED = 1 << PUSHED_BIT
ROW_STATE = TOMBSTONE | PUSHED

ROW_SECOND_HASH = 0
ROW_EVENT_TIME = 8
ROW_PRESENCE = 16

OWN_AGE = 1 << 62
"""The bit that marks a row with an age of its own. The age of such a row is computed from the row's own event time, and
never from the low watermark of its view. In such a row, this bit of the event time is inverted. Event times lie within
the years 1 to 9999 and take 59 bits, so in all other rows the two highest bits of the event time are equal."""


def is_own_age(word: int) -> bool:
    """Return whether the bit OWN_AGE of a stored event time is inverted. `word` is the event time as a signed
    integer."""
    return bool((word >> 62 ^ word >> 63) & 1)


HEAP_LENGTH_BITS = 24
MAX_HEAP_VALUE = (1 << HEAP_LENGTH_BITS) - 1
"""The longest string, bytes or list value, in bytes; a heap reference is offset << 24 | length."""

ROWS_PER_BUCKET = 4
SMALL_ROWS = 1 << 16
"""The maximum number of rows of a small chunk; most overlays are small. The hashes of a small chunk take at most half a
megabyte and stay in the CPU caches."""
SPARSE_ROWS = 1 << 18
BUCKETS_PER_SPARSE_ROW = 4
"""The number of buckets per row in a chunk of at most SPARSE_ROWS rows. Most such chunks are overlays, and an overlay
does not contain most of the requested keys. Therefore most buckets of such a chunk are left empty."""

_SECTION_ALIGNMENT = 64
_VALUE_ALIGNMENT = 16
"""A large value begins 16 bytes after the start of an LMDB page. Sections begin at 48 modulo 64 inside the value, so
that they begin at the start of a cache line. Only speed depends on this."""


class ValueStorage(IntEnum):
    """The storage form of a feature's value in a row."""

    BYTE = 0
    WORD_4 = 1
    WORD_8 = 2
    INLINE = 3
    HEAP = 4


_STORAGE = {
    "bool": ValueStorage.BYTE,
    "int32": ValueStorage.WORD_4,
    "float32": ValueStorage.WORD_4,
    "int64": ValueStorage.WORD_8,
    "float64": ValueStorage.WORD_8,
    "timestamp": ValueStorage.WORD_8,
}
_ITEM_WIDTHS = {"list<int64>": 8, "list<float32>": 4}
_WIDTH = {ValueStorage.BYTE: 1, ValueStorage.WORD_4: 4, ValueStorage.WORD_8: 8, ValueStorage.HEAP: 8}


def storage_of(feature_type: str) -> ValueStorage:
    """Return the storage form of a feature type in a row."""
    return ValueStorage.INLINE if embedding_size(feature_type) else _STORAGE.get(feature_type, ValueStorage.HEAP)


def width_of(feature_type: str) -> int:
    """Return the size in bytes of a feature of this type in a row."""
    size = embedding_size(feature_type)
    return 4 * size if size else _WIDTH[storage_of(feature_type)]


def item_width(feature_type: str) -> int:
    """Return the item size in bytes of a heap value: the element size for lists of numbers, 1 for all other types. The
    length of a heap value is a multiple of the item size."""
    return _ITEM_WIDTHS.get(feature_type, 1)


class RowLayout:
    """The positions of the fields in a view's rows.

    A row is: second hash (8 bytes), event time (int64 microseconds since 1970, 8 bytes), presence bitmap, then the
    features, padded to a multiple of 8 bytes. Narrow features come first, so that each feature is aligned to its width.
    """

    def __init__(self, schema: ViewSchema) -> None:
        self.schema = schema
        self.offsets, self.stride = _lay_out(tuple(feature.type for feature in schema.features))


@cache
def _lay_out(types: tuple[str, ...]) -> tuple[tuple[int, ...], int]:
    """Return the offsets of features of these types in a row, and the row's length, both in bytes."""
    position = ROW_PRESENCE + (len(types) + FIRST_FEATURE_BIT + 7) // 8
    offsets = [0] * len(types)
    for alignment in (1, 4, 8):
        for index, feature_type in enumerate(types):
            if _alignment(feature_type) == alignment:
                position = _round_up(position, alignment)
                offsets[index] = position
                position += width_of(feature_type)
    return tuple(offsets), _round_up(position, 8)


def _alignment(feature_type: str) -> int:
    return 4 if embedding_size(feature_type) else width_of(feature_type)


@dataclass(frozen=True)
class ChunkHeader:
    """The header of a chunk. The members that are named after sections are byte offsets from the start of the value;
    `origins` is 0 if all rows have the segment's first origin. The directory consists of `buckets + 1` uint32 row
    numbers; its index is `bucket(hash) = unsigned(hash - min_hash) >> shift`."""

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
        """Return the header as `HEADER_SIZE` bytes."""
        values = [getattr(self, field.name) for field in fields(self)]
        return self._STRUCT.pack(MAGIC, FORMAT_VERSION, *values).ljust(HEADER_SIZE, b"\0")

    @classmethod
    def stated_size(cls, head: bytes, origin: str) -> int:
        """Return the size of a chunk in bytes, from its header.

        Raises:
            StoreDamaged: the bytes are not the header of a chunk, or the chunk has another format.
        """
        magic, version, *values = cls._STRUCT.unpack_from(head)
        if magic != MAGIC or version != FORMAT_VERSION:
            raise StoreDamaged(f"{origin} starts with {magic!r} version {version}, expected {MAGIC!r} {FORMAT_VERSION}")
        return int(values[-2])

    @classmethod
    def unpack(cls, value: "memoryview | bytes", origin: str) -> "ChunkHeader":
        """Return the header of a chunk, after a check that the sections lie inside the chunk.

        Args:
            origin: the name of the chunk in errors.

        Raises:
            StoreDamaged: the value is not a chunk, has another format, or its sections do not fit.
        """
        if len(value) < HEADER_SIZE:
            raise StoreDamaged(f"{origin} has {len(value)} bytes, but a chunk has at least {HEADER_SIZE}; {LOAD_AGAIN}")
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
            raise StoreDamaged(f"{origin}: its directory does not cover all of its hashes; {LOAD_AGAIN}")


HEADER_SIZE = 176
CHECKSUM_OFFSET = ChunkHeader._STRUCT.size - 8
"""The offset of the checksum, the last member of the header. The checksum is the XXH3 (64 bits) of the whole chunk,
with zero in place of the checksum."""


def section_start(position: int) -> int:
    """Return the first offset at or after `position` at which a section may begin."""
    return _round_up(position + _VALUE_ALIGNMENT, _SECTION_ALIGNMENT) - _VALUE_ALIGNMENT


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def most_buckets(rows: int) -> int:
    """Return the maximum number of buckets in a chunk's directory. The directory has more than half of this number.

    In a large chunk, a bucket has about as many hashes as fit into a cache line.
    """
    return rows * BUCKETS_PER_SPARSE_ROW if rows <= SPARSE_ROWS else rows // ROWS_PER_BUCKET
