"""The answer as an Arrow IPC stream of one record batch (see `LookupResult.to_arrow`). The stream can contain features
of every type, and nulls.

For numbers, the body of the batch is the gathered memory itself. The head before the body (the schema and the batch's
metadata) depends only on the features, the number of keys and whether there are nulls. So the head is encoded once and
cached. Source: Apache Arrow Columnar Format, "Serialization and Interprocess Communication".
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shoal.engine.format.schema import arrow_type
from shoal.engine.lookup.allowance import UNLIMITED, Allowance
from shoal.engine.lookup.result import LookupResult, ViewColumns

MEDIA_TYPE = "application/vnd.apache.arrow.stream"

_NUMBERS = {"int32", "int64", "float32", "float64", "timestamp"}
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"


def encode(result: LookupResult, allowance: Allowance = UNLIMITED) -> bytes:
    """Return the answer as an Arrow stream; raise RequestTooLarge if it is over the allowance."""
    allowance.check(result.nbytes)
    if result.keys and all(_NUMBERS.issuperset(part.program.types) for part in result.parts):
        return _encode_numbers(result)
    return _encode_any(result)


def _encode_any(result: LookupResult) -> bytes:
    return _stream(result.to_arrow().replace_schema_metadata(None))


def _encode_numbers(result: LookupResult) -> bytes:
    types = tuple(part.program.types for part in result.parts)
    nullable = any(part.nulls.any() for part in result.parts)
    head, null_counts_at = _head(result.plan.references, types, result.plan.order, result.keys, nullable)
    if not nullable:
        return b"".join((head, *_columns(result), _END_OF_STREAM))
    patched = np.frombuffer(head, np.uint8).copy()
    nodes = patched[null_counts_at : null_counts_at + 16 * len(result.plan.order)].view(np.int64)
    nodes[1::2] = [result.parts[part].nulls[column] for part, column in result.plan.order]
    return b"".join((patched.data, *_columns_with_validity(result), _END_OF_STREAM))


def _columns(result: LookupResult) -> Iterator[Any]:
    """Yield the buffers of the body of an answer without nulls: the columns, each padded to a multiple of 8 bytes."""
    if len(result.parts) == 1 and _is_in_order(result.plan.order):
        yield result.parts[0].arena.data
        return
    yield from (_values(result.parts[part], column) for part, column in result.plan.order)


def _columns_with_validity(result: LookupResult) -> Iterator[Any]:
    """Yield the buffers of the body of an answer with nulls: each column's validity, then its values."""
    validity = [_bitmaps(part) for part in result.parts]
    for part, column in result.plan.order:
        yield validity[part][column].data
        yield _values(result.parts[part], column)


def _values(part: ViewColumns, column: int) -> Any:
    starts = part.starts
    end = starts[column + 1] if column + 1 < starts.size else part.arena.size
    return part.arena[starts[column] : end].data


def _bitmaps(part: ViewColumns) -> npt.NDArray[np.uint8]:
    """Return the validity bitmaps of all columns, each padded to a multiple of 8 bytes."""
    packed = np.packbits(part.valid, axis=1, bitorder="little")
    return np.pad(packed, ((0, 0), (0, -packed.shape[1] % 8)))


@lru_cache(maxsize=512)
def _is_in_order(order: tuple[tuple[int, int], ...]) -> bool:
    return all(column == place for place, (_, column) in enumerate(order))


@lru_cache(maxsize=2048)
def _head(
    references: tuple[str, ...],
    types: tuple[tuple[str, ...], ...],
    order: tuple[tuple[int, int], ...],
    keys: int,
    nullable: bool,
) -> tuple[bytes, int]:
    """Return the head before the body, and the position of the field nodes in the head. A field node has the length and
    the null count of a column, both as int64."""
    data_types = [arrow_type(types[part][column]) for part, column in order]
    # If the first value is null, pyarrow describes a validity buffer.
    columns = [pa.array([None if nullable else 0] + [0] * (keys - 1), data_type) for data_type in data_types]
    batch = pa.RecordBatch.from_arrays(columns, names=list(references))
    stream = _stream(batch)
    bitmaps = _round_up(-(-keys // 8)) * len(columns) if nullable else 0
    body = bitmaps + sum(_round_up(data_type.bit_width // 8 * keys) for data_type in data_types)
    head = stream[: len(stream) - body - len(_END_OF_STREAM)]
    nodes = np.array([[keys, int(nullable)]] * len(columns), np.int64).tobytes()
    return head, head.index(nodes)


def _round_up(size: int) -> int:
    """Return the padded size of a buffer in a message's body, in bytes."""
    return -(-size // 8) * 8


def _stream(batch: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    content: bytes = sink.getvalue().to_pybytes()
    return content
