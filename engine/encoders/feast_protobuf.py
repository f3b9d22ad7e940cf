"""The answer of Feast's serving protocol over gRPC: an encoded `GetOnlineFeaturesResponse`.

The protobuf library is not used: it would create an object for each of an answer's tens of thousands of values. The
join keys come first, encoded as in the request. Types are Feast's: a timestamp is whole seconds since 1970, an absent
value is a `Value` with no field set, and a key without a row has the event time 1970-01-01T00:00:00Z.
"""

from collections.abc import Iterator, Mapping
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from shoal.engine.encoders.feast_names import answer_names
from shoal.engine.format.schema import embedding_size
from shoal.engine.kernels import protobuf
from shoal.engine.kernels.gathering import Status
from shoal.engine.kernels.protobuf import Field
from shoal.engine.lookup.allowance import UNLIMITED, Allowance
from shoal.engine.lookup.result import LookupResult, ViewColumns

_FIELDS = {
    "bool": Field.BOOL,
    "int32": Field.INT32,
    "int64": Field.INT64,
    "float32": Field.FLOAT,
    "float64": Field.DOUBLE,
    "timestamp": Field.UNIX_TIMESTAMP,
}
_HEAP_FIELDS = {
    "string": Field.STRING,
    "bytes": Field.BYTES,
    "list<int64>": Field.INT64_LIST,
    "list<float32>": Field.FLOAT_LIST,
    "list<string>": Field.STRING_LIST,
}
_SIZED = 2
_NO_TIME = b"\x1a\x00"


def encode(
    result: LookupResult,
    join_keys: Mapping[str, bytes],
    *,
    full_feature_names: bool = False,
    name_views: bool = False,
    allowance: Allowance = UNLIMITED,
) -> bytes:
    """Return the answer as an encoded message.

    Args:
        result: the result of the lookup.
        join_keys: join key → the request's encoded `RepeatedValue`, with one value per row.
        full_feature_names: name a feature `view__feature` instead of `feature`.
        name_views: list the views of the result in the metadata.
        allowance: the limit on the size of the answer.

    Raises:
        AmbiguousFeature: two names in the answer are the same.
        RequestTooLarge: the answer exceeds the allowance.
    """
    views = tuple(part.rows.view for part in result.parts) if name_views else ()
    head = _head(tuple(join_keys), result.plan.references, full_feature_names, views)
    of_keys = _field(2, bytes([Status.PRESENT]) * result.keys) + _NO_TIME * result.keys
    pieces: list[bytes | memoryview] = [head]
    for values in join_keys.values():
        pieces += (_start(2, len(values) + len(of_keys)), values, of_keys)
    vectors = [list(_vectors(part, allowance)) for part in result.parts]
    for part, column in result.plan.order:
        pieces += vectors[part][column]
    return b"".join(pieces)


def encode_serving_info(version: str) -> bytes:
    """Return an encoded `GetFeastServingInfoResponse`."""
    return _field(1, version.encode())


def _vectors(part: ViewColumns, allowance: Allowance) -> Iterator[tuple[bytes | memoryview, ...]]:
    """For each feature of a view, yield the pieces of its `FeatureVector` as a field of the response."""
    times = np.empty(protobuf.MAX_TIMESTAMP * part.rows.event_time.size, np.uint8)
    of_times = times[: protobuf.write_event_times(part.rows.event_time, times)].data
    of_rows = _field(2, part.rows.status.tobytes())
    for feature, (values, nulls) in enumerate(zip(_values_of(part), part.nulls.tolist(), strict=True)):
        statuses = _field(2, part.columns[feature].status.tobytes()) if nulls else of_rows
        allowance.take(len(values) + len(statuses) + len(of_times))
        yield _start(2, len(values) + len(statuses) + len(of_times)), values, statuses, of_times


def _values_of(part: ViewColumns) -> Iterator[memoryview]:
    """Yield the encoded values of each feature of a view."""
    fields, most_bytes = _table(part.program.types)
    features, keys = part.valid.shape
    out = np.empty(most_bytes * keys + protobuf.OVERWRITTEN, np.uint8)
    ends = np.empty(features, np.int64)
    protobuf.write_columns(fields, part.arena, part.starts, part.valid, out, ends)
    start = 0
    for feature, end in enumerate(ends.tolist()):
        heap = part.heap.get(feature)
        if heap is None:
            yield out[start:end].data
        else:
            field = _HEAP_FIELDS[part.program.types[feature]]
            own = np.empty(protobuf.most_bytes_of_heap(field, keys, heap.data.size), np.uint8)
            yield own[: protobuf.write_heap(int(field), heap.data, heap.offsets, part.valid[feature], own)].data
        start = end


@lru_cache(maxsize=256)
def _table(types: tuple[str, ...]) -> tuple[npt.NDArray[np.int64], int]:
    """Return the table of fields for some feature types, and the maximum size in bytes of the fixed-width values of one
    key."""
    rows = []
    most_bytes = 0
    for feature_type in types:
        items = embedding_size(feature_type)
        field = Field.FLOAT_LIST if items else _FIELDS.get(feature_type, protobuf.ELSEWHERE)
        rows.append([int(field), items or 1])
        if field:
            most_bytes += protobuf.most_bytes(items or 1)
    return np.array(rows, np.int64), most_bytes


@lru_cache(maxsize=2048)
def _head(join_keys: tuple[str, ...], references: tuple[str, ...], full: bool, views: tuple[str, ...]) -> bytes:
    """Return the metadata: the names of the join keys and features that follow, and the names of views."""
    listed = _field(1, *(_field(1, name.encode()) for name in answer_names(join_keys, references, full=full)))
    return _field(1, listed, *(_field(2, _field(1, view.encode())) for view in views))


def _field(number: int, *content: bytes) -> bytes:
    """Return a length-delimited field of a message: a text, a message, or packed numbers."""
    return b"".join((_start(number, sum(map(len, content))), *content))


def _start(number: int, size: int) -> bytes:
    """Return the tag and the length before the `size` bytes of a length-delimited field."""
    return _varint(number << 3 | _SIZED) + _varint(size)


def _varint(number: int) -> bytes:
    digits = bytearray()
    while number >= 0x80:
        digits.append(number & 0x7F | 0x80)
        number >>= 7
    digits.append(number)
    return bytes(digits)
