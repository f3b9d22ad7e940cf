"""The items of a table that holds a view: what their attributes are, and the bytes of a row in one of them.

    k  B  the key: both hashes of a row's key, int64 each, little-endian; the table's only key
    v  B  the row: fingerprint of the schema that it was written under (8 bytes), first hash (8), then the row and its
          variable-length values as in a segment (docs/segment-format.md), references counting from the row's end
    n  B  the join keys, as in a segment
    e  N  event time, microseconds since 1970
    q  N  the seq of the log's entry that wrote it
    h  B  XXH3 (64 bits) of v, by which a snapshot tells what it need not write

Besides, there are items whose keys are words: `progress` says how far the table is, `lease` who writes to it, and
`schema/` with a fingerprint what rows look like that were written under it.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import xxhash
from numba import njit

from engine.dynamodb.client import binary, binary_of
from engine.errors import TableInvalid
from engine.kernels.compiling import kernel
from engine.kernels.memory import copy_bytes, load_i64, load_u8, store_i64
from engine.layout import (
    FIRST_FEATURE_BIT,
    HEAP_LENGTH_BITS,
    MAX_HEAP_VALUE,
    ROW_PRESENCE,
    RowLayout,
    Storage,
    storage_of,
)
from engine.schema import ViewSchema

KEY, VALUE, NAMES, EVENT_TIME, SEQ, ROW_HASH = "k", "v", "n", "e", "q", "h"
KEY_BYTES = 16
ROW_AT = 16
"""Where in `v` the row begins."""

PROGRESS, LEASE = b"progress", b"lease"
_SCHEMA = b"schema/"


@lru_cache(maxsize=1024)
def fingerprint(schema: ViewSchema) -> bytes:
    """What tells schemas apart whose rows are laid out differently: 8 bytes."""
    content = schema.model_dump(mode="json", include={"join_keys", "features"})
    return xxhash.xxh3_64_digest(orjson.dumps(content, option=orjson.OPT_SORT_KEYS))


def schema_key(of: bytes) -> bytes:
    """The key of the item that describes the schema with a fingerprint."""
    return _SCHEMA + of


def schema_item(schema: ViewSchema) -> dict[str, Any]:
    """The item that describes a schema."""
    return {KEY: binary(schema_key(fingerprint(schema))), "s": {"S": schema.model_dump_json()}}


def schema_in(item: dict[str, Any], of: bytes, table: str) -> ViewSchema:
    """The schema that an item describes; raises TableInvalid."""
    try:
        schema = ViewSchema.model_validate_json(item["s"]["S"])
    except (KeyError, TypeError, ValueError) as error:
        raise TableInvalid(f"table {table!r}: the item of schema {of.hex()} cannot be read: {error}") from None
    if fingerprint(schema) != of:
        raise TableInvalid(f"table {table!r}: the item of schema {of.hex()} describes another")
    return schema


@lru_cache(maxsize=1024)
def heap_fields(schema: ViewSchema) -> npt.NDArray[np.int64]:
    """int64[features in the heap, 2]: where in a row each one's reference is, and its presence bit."""
    layout = RowLayout(schema)
    found = [
        (layout.offsets[index], FIRST_FEATURE_BIT + index)
        for index, feature in enumerate(schema.features)
        if storage_of(feature.type) is Storage.HEAP
    ]
    return np.array(found, np.int64).reshape(len(found), 2)


def read_item(item: dict[str, Any]) -> bytes:
    """`v` of an item, decoded."""
    return binary_of(item[VALUE])


@njit(inline="always")
def _is_present(row: int, bit: int) -> Any:
    return load_u8(row + ROW_PRESENCE + (bit >> 3)) >> (bit & 7) & 1 != 0


@kernel
def values_size(rows: int, stride: int, count: int, fields: Any) -> int:
    """The bytes of the `v` of so many rows at an address together."""
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
    """Write the `v` of rows, one after the other, at `to`.

    Args:
        print_of_schema: the fingerprint, as an int64.
        hashes: int64[rows], the first hashes.
        rows, heap: addresses of the rows, and of the heap that they refer to.
        fields: as `heap_fields` has them.
        ends: int64[rows], becomes where each ends.
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
    """Lay the rows of values side by side, with references that count from the first value on.

    Args:
        values: address of the values, one after the other.
        starts: int64[values + 1], where each begins.
        order: int64[values], which of them comes first, and so on.
        fields: as `heap_fields` has them.
        hashes, rows: addresses where the first hashes and the rows go.

    Returns:
        The number of a value that is not a row of this stride with values inside it, or -1.
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
                offset, length = reference >> HEAP_LENGTH_BITS, reference & MAX_HEAP_VALUE
                if offset < 0 or offset + length > heap_size:
                    return int(number)
                store_i64(row + fields[field, 0], (heap_at + offset) << HEAP_LENGTH_BITS | length)
    return -1
