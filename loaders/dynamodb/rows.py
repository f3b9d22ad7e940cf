"""Convert published rows to items of a table: see `shoal.engine.dynamodb.items`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from shoal.engine.base.errors import RowTooLarge
from shoal.engine.dynamodb.client import binary, number
from shoal.engine.dynamodb.items import (
    EVENT_TIME,
    KEY,
    NAMES,
    ROW_HASH,
    SEQ,
    VALUE,
    fingerprint,
    heap_fields,
    pack_values,
    values_size,
)
from shoal.engine.format.keys import KEY_HASH, KEY_HASH_2
from shoal.engine.format.layout import RowLayout
from shoal.engine.kernels.memory import address_of
from shoal.engine.root.manifest import EVENT_TIMESTAMP, TOMBSTONE, Manifest
from shoal.loaders.segments.arrow_rows import encode
from shoal.loaders.segments.low_watermark import rows_with_own_age
from shoal.loaders.segments.segment_writer import ChunkBuilder, ChunkMemory

ROWS_AT_ONCE = 2048
_UNIT_BYTES = 1024
_LARGEST_ITEM = 400 << 10


@dataclass(frozen=True)
class Row:
    """A published row, or a tombstone with the value None. `event_time` is in microseconds since 1970."""

    key: bytes
    event_time: int
    value: bytes | None = None
    names: bytes = b""

    @property
    def row_hash(self) -> bytes:
        """The 8-byte hash of the row's value, to compare rows with the same key."""
        return xxhash.xxh3_64_digest(self.value or b"")

    def item(self, seq: int) -> dict[str, Any]:
        """Return the row as an item of the table. `seq` is the number of the log entry that contains the row."""
        assert self.value is not None
        return {
            KEY: binary(self.key),
            VALUE: binary(self.value),
            NAMES: binary(self.names),
            EVENT_TIME: number(self.event_time),
            SEQ: number(seq),
            ROW_HASH: binary(self.row_hash),
        }

    def write_units(self, seq: int) -> int:
        """Return how many write units it takes to write the row. For a tombstone, return 1, because the size of the
        item to delete is not known.

        Raises:
            RowTooLarge: the row is larger than DynamoDB's limit for an item.
        """
        if self.value is None:
            return 1
        size = 6 + len(self.key) + len(self.value) + len(self.names) + 8
        size += _number_bytes(self.event_time) + _number_bytes(seq)
        if size > _LARGEST_ITEM:
            raise RowTooLarge(
                f"the row of key {self.key.hex()} takes {size} bytes, but an item of DynamoDB at most {_LARGEST_ITEM}; "
                f"keep the view local, or its large values elsewhere"
            )
        return -(-size // _UNIT_BYTES)


def _number_bytes(value: int) -> int:
    """Return the bytes that DynamoDB counts for a number.

    That is one byte per two digits, plus one byte, plus another byte for a negative number. Trailing zeros are not
    counted.
    """
    digits = str(abs(value)).rstrip("0")
    return (len(digits) + 1) // 2 + (2 if value < 0 else 1)


def published_rows(manifest: Manifest, batch: pa.RecordBatch) -> Iterator[list[Row]]:
    """Yield the rows of a batch that `EntryReader` returned, at most ROWS_AT_ONCE rows at a time.

    Raises:
        ValueError: a value does not fit its feature.
    """
    memory = ChunkMemory()
    for start in range(0, batch.num_rows, ROWS_AT_ONCE):
        yield _rows(manifest, batch.slice(start, ROWS_AT_ONCE), memory)


def _rows(manifest: Manifest, batch: pa.RecordBatch, memory: ChunkMemory) -> list[Row]:
    schema = manifest.view
    layout = RowLayout(schema)
    count = batch.num_rows
    chunk = ChunkBuilder(layout, count, with_origins=False, memory=memory)
    encode(chunk, 0, batch, own_age=rows_with_own_age(manifest, batch))
    fields = heap_fields(schema)
    heap = address_of(chunk.buffer.content) + chunk.heap_start
    content = np.empty(values_size(chunk.row_address, layout.stride, count, fields), np.uint8)
    ends = np.empty(count, np.int64)
    schema_print = int.from_bytes(fingerprint(schema), "little", signed=True)
    pack_values(schema_print, chunk.hashes, chunk.row_address, layout.stride, heap, fields, address_of(content), ends)
    values = content.tobytes()
    names = chunk.keys.content.tobytes()
    keys = np.stack([batch.column(name).to_numpy() for name in (KEY_HASH, KEY_HASH_2)], axis=1).tobytes()
    times = batch.column(EVENT_TIMESTAMP).cast(pa.int64()).to_pylist()
    dead = batch.column(TOMBSTONE).to_pylist() if TOMBSTONE in batch.schema.names else [False] * count
    rows = []
    begin = 0
    name_ends = chunk.key_offsets.tolist()
    for number_of_row, end in enumerate(ends.tolist()):
        key = keys[16 * number_of_row : 16 * number_of_row + 16]
        if dead[number_of_row]:
            rows.append(Row(key, times[number_of_row]))
        else:
            own_names = names[name_ends[number_of_row] : name_ends[number_of_row + 1]]
            rows.append(Row(key, times[number_of_row], values[begin:end], own_names))
        begin = end
    return rows
