"""The items in the table of a view: their attributes, and the encoding of a row.

    k  B  the key: both hashes of a row's key, int64 each, little-endian; the table's only key
    v  B  the row: fingerprint of its schema (8 bytes), first hash (8), then the row and its variable-length values as
          in a segment (docs/segment-format.md); a reference counts from the end of the row
    n  B  the join keys, as in a segment
    e  N  event time, microseconds since 1970
    q  N  the seq of the log entry that wrote the row
    h  B  XXH3 (64 bits) of v; with this hash, a snapshot skips unchanged rows

Other items have a word as their key. The item `progress` has the position of the table in the log. The item `lease` has
the writer of the table. An item `schema/` followed by a fingerprint has the schema of the rows with this fingerprint.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import xxhash
from numba import njit

from shoal.engine.base.errors import TableInvalid
from shoal.engine.dynamodb.client import binary, binary_of
from shoal.engine.format.layout import (
    FIRST_FEATURE_BIT,
    HEAP_LENGTH_BITS,
    MAX_HEAP_VALUE,
    ROW_PRESENCE,
    RowLayout,
    ValueStorage,
    storage_of,
)
from shoal.engine.format.schema import ViewSchema
from shoal.engine.kernels.compiling import kernel
from shoal.engine.kernels.memory import copy_bytes, load_i64, load_u8, store_i64

KEY, VALUE, NAMES, EVENT_TIME, SEQ, ROW_HASH = "k", "v", "n", "e", "q", "h"
KEY_BYTES = 16
ROW_AT = 16
"""The start of the row in `v`, in bytes."""

PROGRESS, LEASE = b"progress", b"lease"
_SCHEMA = b"schema/"


@lru_cache(maxsize=1024)
def fingerprint(schema: ViewSchema) -> bytes:
    """Return 8 bytes that differ between schemas with different row layouts."""
    content = schema.model_dump(mode="json", include={"join_keys", "features"})
    return xxhash.xxh3_64_digest(orjson.dumps(content, option=orjson.OPT_SORT_KEYS))


def schema_key(schema_id: bytes) -> bytes:
    """Return the key of the item that describes a schema, from the schema's fingerprint."""
    return _SCHEMA + schema_id


def schema_item(schema: ViewSchema) -> dict[str, Any]:
    """Return the item that describes a schema."""
    return {KEY: binary(schema_key(fingerprint(schema))), "s": {"S": schema.model_dump_json()}}


def schema_in(item: dict[str, Any], schema_id: bytes, table: str) -> ViewSchema:
    """Return the schema that an item describes; raise TableInvalid if the item is damaged, or describes another
    schema."""
    try:
        schema = ViewSchema.model_validate_json(item["s"]["S"])
    except (KeyError, TypeError, ValueError) as error:
        raise TableInvalid(f"table {table!r}: the item of schema {schema_id.hex()} cannot be read: {error}") from None
    if fingerprint(schema) != schema_id:
        raise TableInvalid(f"table {table!r}: the item of schema {schema_id.hex()} describes another schema")
    return schema


@lru_cache(maxsize=1024)
def heap_fields(schema: ViewSchema) -> npt.NDArray[np.int64]:
    """Return int64[features in the heap, 2]: for each feature, the offset of its reference in a row, and its presence
    bit."""
    layout = RowLayout(schema)
    found = [
        (layout.offsets[index], FIRST_FEATURE_BIT + index)
        for index, feature in enumerate(schema.features)
        if storage_of(feature.type) is ValueStorage.HEAP
    ]
    return np.array(found, np.int64).reshape(len(found), 2)


def read_item(item: dict[str, Any]) -> bytes:
    """Return `v` of an item, decoded."""
    return binary_of(item[VALUE])


@njit(inline="always")
def _is_present(row: int, bit: int) -> Any:
    return load_u8(row + ROW_PRESENCE + (bit >> 3)) >> (bit & 7) & 1 != 0


@kernel
def values_size(rows: int, stride: int, count: int, fields: Any) -> int:
    """Return the total size in bytes of the `v` of `count` rows. `rows` is the address of the first row."""
    total = count * (ROW_AT + stride)
    for number in range(count):
        row = rows + stride * number
        for field in range(fields.shape[0]):
            if _is_present(row, fields[field, 1]):
                total += load_i64(row + fields[field, 0]) & MAX_HEAP_VALUE
    return total


@kernel
def pack_values(
    print_of_schema: int, hashes: Any, rows: int, stride: int, heap: int, fields: Any, to: int, ends: Any
) -> None:
    """Write the `v` of each row, one after the other, to the address `to`.

    Args:
        print_of_schema: the fingerprint, as an int64.
        hashes: int64[rows], the first hashes.
        rows, heap: the address of the rows, and the address of the heap that the rows refer to.
        fields: the result of `heap_fields`.
        ends: int64[rows], an output: the end of each `v`, counted from `to`.
    """
    position = 0
    for number in range(hashes.size):
        source = rows + stride * number
        store_i64(to + position, print_of_schema)
        store_i64(to + position + 8, hashes[number])
        row = to + position + ROW_AT
        copy_bytes(row, source, stride)
        used = 0
        for field in range(fields.shape[0]):
            if _is_present(source, fields[field, 1]):
                reference = load_i64(source + fields[field, 0])
                length = reference & MAX_HEAP_VALUE
                copy_bytes(row + stride + used, heap + (reference >> HEAP_LENGTH_BITS), length)
                store_i64(row + fields[field, 0], used << HEAP_LENGTH_BITS | length)
                used += length
        position += ROW_AT + stride + used
        ends[number] = position


@kernel
def unpack_values(values: int, starts: Any, order: Any, stride: int, fields: Any, hashes: int, rows: int) -> int:
    """Copy the row in each value to `rows`, one row after the other. In the copies, references count from the start of
    the first value.

    Args:
        values: the address of the values, one after the other.
        starts: int64[values + 1], the start of each value, and the end of the last value.
        order: int64[values], the index of each value, in the order of the output.
        fields: the result of `heap_fields`.
        hashes, rows: the addresses to which the first hashes and the rows are written.

    Returns:
        The index of an invalid value, or -1 if all values are valid. A value is invalid if it is shorter than a row of
        this stride, or if a reference leads out of the value.
    """
    for place in range(order.size):
        number = order[place]
        value = values + starts[number]
        size = starts[number + 1] - starts[number]
        if size < ROW_AT + stride:
            return int(number)
        store_i64(hashes + 8 * place, load_i64(value + 8))
        row = rows + stride * place
        copy_bytes(row, value + ROW_AT, stride)
        heap_size = size - ROW_AT - stride
        heap_at = starts[number] + ROW_AT + stride
        for field in range(fields.shape[0]):
            if _is_present(row, fields[field, 1]):
                reference = load_i64(row + fields[field, 0])
                offset = reference >> HEAP_LENGTH_BITS
                length = reference & MAX_HEAP_VALUE
                if offset < 0 or offset + length > heap_size:
                    return int(number)
                store_i64(row + fields[field, 0], (heap_at + offset) << HEAP_LENGTH_BITS | length)
    return -1
