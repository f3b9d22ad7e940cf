"""Rows that a client writes directly: they are checked against their view, and encoded for the writer.

The encoding is an Arrow record batch with the columns of a published delta (see `shoal.engine.root.manifest`). A batch
may leave out a feature: its rows then keep the stored values of this feature.
"""

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from types import NoneType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shoal.engine.base.errors import LookupInvalid, PushElsewhere, PushInvalid
from shoal.engine.base.quoting import abbreviated
from shoal.engine.base.times import (
    ALLOWED_YEARS,
    FURTHEST_AHEAD,
    later_than,
    outside_range,
    shown_time,
)
from shoal.engine.format.feast_values import is_value_of
from shoal.engine.format.keys import KEY_HASH, KEY_HASH_2
from shoal.engine.format.layout import MAX_HEAP_VALUE
from shoal.engine.format.schema import Feature, arrow_type, embedding_size
from shoal.engine.lookup.key_columns import KeyColumns, example_of, key_array
from shoal.engine.root.manifest import EVENT_TIMESTAMP, TOMBSTONE
from shoal.engine.store.version import ViewVersion

EVENT_TIME_COLUMN = "event_timestamp"
"""The column with the event time in a client's rows. Without this column, the event time is the time of arrival."""

_OWN_COLUMNS: Mapping[str, pa.DataType] = {
    KEY_HASH: pa.int64(),
    KEY_HASH_2: pa.int64(),
    EVENT_TIMESTAMP: pa.timestamp("us", tz="UTC"),
    TOMBSTONE: pa.bool_(),
}
"""The columns in every batch for the writer."""

_PLAIN_KINDS: Mapping[str, set[type]] = {
    "bool": {bool, NoneType},
    "int32": {int, NoneType},
    "int64": {int, NoneType},
    "float32": {float, int, NoneType},
    "float64": {float, int, NoneType},
    "string": {str, NoneType},
}
_TIMESTAMP = pa.timestamp("us", tz="UTC")
_YEAR = re.compile(r"([+-]?[0-9]{4,12})-[0-9]{2}-[0-9]{2}")
"""The beginning of a date in ISO 8601, of any year."""


def check_takes_pushes(view: ViewVersion) -> None:
    """Raise PushElsewhere if a view's rows are not kept on this node."""
    if view.is_remote:
        raise PushElsewhere(
            f"view {view.name!r} is kept in table {view.record.view_schema.table_name!r}, which only `shoal "
            f"sync-dynamodb` writes; publish the rows to the export root instead, or set the view's tier to local"
        )


def pushed_rows(view: ViewVersion, columns: Mapping[str, Any], *, now: datetime) -> pa.RecordBatch:
    """Return pushed rows as a batch for the writer. A row is valid from its event time on.

    Args:
        view: the view of the rows.
        columns: column name → a list, NumPy array or Arrow array of values, all of the same length. The columns are the
            join keys, `event_timestamp` (ISO 8601 or typed; UTC without a time zone), and any of the features.
        now: the event time of rows without one. Event times more than a day later are rejected.

    Raises:
        PushElsewhere: the view's rows are not kept on this node.
        PushInvalid: a column is unknown or missing, or has a wrong length or type. Or a time is outside the years 1 to
            9999, or an event time is too far in the future.
    """
    check_takes_pushes(view)
    columns = dict(columns)
    times = columns.pop(EVENT_TIME_COLUMN, None)
    keys = {key.name: columns.pop(key.name) for key in view.join_keys if key.name in columns}
    features = [feature for feature in view.record.view_schema.features if feature.name in columns]
    if len(features) < len(columns):
        known = {feature.name for feature in features}
        unknown = next(name for name in columns if name not in known)
        names = [key.name for key in view.join_keys] + [feature.name for feature in view.record.view_schema.features]
        raise PushInvalid(
            f"view {view.name!r} has no column {unknown!r}; a push to it may have {EVENT_TIME_COLUMN}, "
            f"{', '.join(names)}"
        )
    if not features:
        raise PushInvalid(f"a push to view {view.name!r} holds no feature; give some, or delete the rows")
    values = {feature.name: _feature_array(feature, columns[feature.name]) for feature in features}
    return _batch(view, keys, times, now, values, tombstone=False)


def deleted_rows(view: ViewVersion, columns: Mapping[str, Any], *, now: datetime) -> pa.RecordBatch:
    """Return tombstones as a batch for the writer. From the event time of its tombstone on, a key has no row. The
    arguments and errors are those of `pushed_rows`, but the columns contain no features."""
    check_takes_pushes(view)
    columns = dict(columns)
    times = columns.pop(EVENT_TIME_COLUMN, None)
    keys = {key.name: columns.pop(key.name) for key in view.join_keys if key.name in columns}
    if columns:
        raise PushInvalid(
            f"{next(iter(columns))!r} is not a join key of view {view.name!r}; a deletion has {EVENT_TIME_COLUMN} and "
            f"{', '.join(key.name for key in view.join_keys)}"
        )
    return _batch(view, keys, times, now, {}, tombstone=True)


def from_base64(name: str, values: Sequence[Any]) -> list[bytes | None]:
    """Return a column of bytes from base64 texts, with nulls unchanged; raise PushInvalid if a value is not base64."""
    try:
        return [None if value is None else base64.b64decode(value, validate=True) for value in values]
    except (binascii.Error, TypeError, ValueError) as error:
        raise PushInvalid(f"column {name!r} must be bytes in base64: {error}") from None


def serialize_rows(batches: Sequence[pa.RecordBatch]) -> bytes:
    """Return rows as bytes for the writer: one Arrow stream per batch, one after the other."""
    sink = pa.BufferOutputStream()
    for batch in batches:
        with pa.ipc.new_stream(sink, batch.schema) as stream:
            stream.write_batch(batch)
    return bytes(sink.getvalue())


def deserialize_rows(body: bytes) -> list[pa.RecordBatch]:
    """Return the batches that `serialize_rows` wrote; raise PushInvalid if a batch is invalid, or has a time out of
    range."""
    source = pa.BufferReader(body)
    batches = []
    try:
        while source.tell() < len(body):
            with pa.ipc.open_stream(source) as stream:
                batches += list(stream)
        for batch in batches:
            batch.validate(full=True)
            _check_own_columns(batch)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise PushInvalid(f"the body is not an Arrow stream: {error}") from None
    return batches


def _check_own_columns(batch: pa.RecordBatch) -> None:
    for name, wanted in _OWN_COLUMNS.items():
        index = batch.schema.get_field_index(name)  # Also -1 if two columns have this name.
        if index < 0 or batch.schema.field(index).type != wanted or batch.column(index).null_count:
            raise PushInvalid(f"the rows need one column {name!r} of type {wanted} without nulls; a worker sends it")
    for field in batch.schema:
        if pa.types.is_timestamp(field.type):
            check_range(field.name, batch.column(field.name))


def _batch(
    view: ViewVersion,
    keys: Mapping[str, Any],
    times: Any,
    now: datetime,
    values: Mapping[str, pa.Array],
    tombstone: bool,
) -> pa.RecordBatch:
    missing = [key.name for key in view.join_keys if key.name not in keys]
    if missing:
        raise PushInvalid(f"a push to view {view.name!r} lacks its join key {missing[0]!r}")
    try:
        arrays = {key.name: key_array(key, _listed(key.name, keys[key.name])) for key in view.join_keys}
        hashes = KeyColumns(arrays).hashes(view)
    except LookupInvalid as error:
        raise PushInvalid(str(error)) from None
    count = hashes.shape[1]
    event_times = _event_times(times, now, count)
    for name, array in [(EVENT_TIME_COLUMN, event_times), *values.items()]:
        if len(array) != count:
            raise PushInvalid(f"column {name!r} has {len(array)} values, but {view.join_keys[0].name!r} has {count}")
    columns = {
        KEY_HASH: pa.array(hashes[0]),
        KEY_HASH_2: pa.array(hashes[1]),
        EVENT_TIMESTAMP: event_times,
        TOMBSTONE: pa.array(np.full(count, tombstone)),
    }
    return pa.RecordBatch.from_pydict(columns | arrays | dict(values))


def _listed(name: str, values: Any) -> Any:
    if isinstance(values, str | bytes | Mapping) or not hasattr(values, "__len__"):
        raise PushInvalid(f"column {name!r} is {abbreviated(values)}; give a list of values, one per row")
    return values


def _event_times(values: Any, now: datetime, count: int) -> pa.Array:
    if values is None:
        return pa.array([now] * count, _TIMESTAMP)
    times = _timestamps(EVENT_TIME_COLUMN, _listed(EVENT_TIME_COLUMN, values))
    if times.null_count:
        row = pc.index(times.is_null(), True).as_py()
        raise PushInvalid(
            f"column {EVENT_TIME_COLUMN!r} is null in row {row}; leave the column out to use the current time"
        )
    if (ahead := later_than(times, now + FURTHEST_AHEAD)) is not None:
        # A row with an event time in the year 5000 would be newer than all rows pushed after it, and would supersede
        # them.
        row, time = ahead
        raise PushInvalid(
            f"column {EVENT_TIME_COLUMN!r} holds {shown_time(time)} in row {row}, more than a day in the future; check "
            f"the time unit and the client's clock"
        )
    return times


def _timestamps(name: str, values: Any) -> pa.Array:
    """Return timestamps from ISO 8601 texts, datetimes, or an array of any timestamp type. Times without a time zone
    are in UTC."""
    if isinstance(values, Sequence):
        values = [_parsed(name, row, value) for row, value in enumerate(values)]
    values = _inferred(name, values)
    if pa.types.is_timestamp(values.type):
        check_range(name, values)
    if pa.types.is_null(values.type) or pa.types.is_timestamp(values.type):
        return _cast(name, "timestamp", values, _TIMESTAMP)
    raise PushInvalid(f"column {name!r} holds {values.type}, such as {example_of(values)}; give timestamps in ISO 8601")


def check_range(name: str, times: pa.Array) -> None:
    """Raise PushInvalid if a column of timestamps, in any unit, contains a time outside the years 1 to 9999."""
    if (outside := outside_range(times)) is not None:
        row, time = outside
        raise PushInvalid(f"column {name!r} holds {shown_time(time)} in row {row}; give times in {ALLOWED_YEARS}")


def _parsed(name: str, row: int, value: Any) -> Any:
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            if (year := _YEAR.match(value)) and not 1 <= int(year[1]) <= 9999:
                raise PushInvalid(
                    f"column {name!r} holds {abbreviated(value)} in row {row}; give times in {ALLOWED_YEARS}"
                ) from None
            raise PushInvalid(
                f"column {name!r} holds {abbreviated(value)} in row {row}; give timestamps in ISO 8601"
            ) from None
    return value.replace(tzinfo=UTC) if isinstance(value, datetime) and value.tzinfo is None else value


def _feature_array(feature: Feature, values: Any) -> pa.Array:
    """Return the values of a feature in the form that `shoal.loaders.segments.arrow_rows` encodes."""
    name = feature.name
    wanted = feature.type
    size = embedding_size(wanted)
    values = _listed(name, values)
    if wanted == "timestamp":
        return _timestamps(name, values)
    plain = _plain_array(wanted, values)
    if plain is not None:
        return plain
    array = _inferred(name, values)
    to = pa.list_(pa.float32()) if size else arrow_type(wanted)
    if not _is_kind_of(array.type, to):
        raise PushInvalid(f"column {name!r} must be {wanted}, but holds {array.type}, such as {example_of(array)}")
    holds_lists = pa.types.is_list(to) and not pa.types.is_null(array.type)
    if holds_lists and pa.types.is_null(array.type.value_type) and len(array.flatten()):
        # Check this before the cast. An array of nulls takes no memory, whatever its length. The cast makes numbers of
        # the nulls, and numbers take memory.
        raise _null_in_list(name)
    array = _cast(name, wanted, array, to)
    if feature.feast_member is not None:
        _check_messages(name, feature.feast_member, array)
    if pa.types.is_list(array.type):
        if array.flatten().null_count:
            raise _null_in_list(name)
        lengths = pc.list_value_length(array)
        if size and not pc.all(pc.equal(lengths, size), min_count=0).as_py():
            raise PushInvalid(f"column {name!r} must be {wanted}: a list in it does not have {size} items")
    longest = _longest(array)
    if longest > MAX_HEAP_VALUE:
        raise PushInvalid(f"column {name!r} has a value of {longest} bytes, the maximum is {MAX_HEAP_VALUE}")
    return array


def _check_messages(name: str, member: str, values: pa.Array) -> None:
    for row, value in enumerate(values.to_pylist()):
        if value is not None and not is_value_of(value, member):
            raise PushInvalid(
                f"column {name!r} holds {abbreviated(value)} in row {row}, which is not Feast's message Value with "
                f"{member}; write this feature with Feast's SDK, with Shoal as its online store, or give null"
            )


def _null_in_list(name: str) -> PushInvalid:
    return PushInvalid(f"column {name!r} has a list that holds null; leave such items out")


def _plain_array(wanted: str, values: Any) -> pa.Array | None:
    """Return a list of values as an array, if all values are plain and of exactly the wanted type. Return None if the
    values need a closer check. Most columns need no closer check, which saves a third of the time."""
    kinds = _PLAIN_KINDS.get(wanted)
    if kinds is None or not isinstance(values, list) or not kinds.issuperset(map(type, values)):
        return None
    try:
        array = pa.array(values, arrow_type(wanted))
    except (pa.ArrowInvalid, OverflowError, UnicodeError):
        return None
    if wanted == "float32" and np.isinf(array.to_numpy(zero_copy_only=False)).any():
        return None
    return array if wanted != "string" or array.nbytes <= MAX_HEAP_VALUE else None


def _longest(array: pa.Array) -> int:
    """Return the largest size in bytes that one of the values has in a segment's heap."""
    if pa.types.is_string(array.type) or pa.types.is_binary(array.type):
        return int(pc.max(pc.binary_length(array)).as_py() or 0)
    if not pa.types.is_list(array.type):
        return 0
    counts = pc.list_value_length(array).fill_null(0).to_numpy()
    if not pa.types.is_string(array.type.value_type):
        return int(counts.max(initial=0) * array.type.value_type.bit_width) // 8
    ends = np.concatenate([[0], np.cumsum(pc.binary_length(array.flatten()).to_numpy(), dtype=np.int64)])
    last = np.cumsum(counts, dtype=np.int64)
    return int((ends[last] - ends[last - counts] + 4 * counts + 4).max(initial=0))


def _inferred(name: str, values: Any) -> pa.Array:
    """Return values as an array of the type that Arrow infers. A conversion to an integer type would turn 1.5 into
    1."""
    if isinstance(values, pa.ChunkedArray):
        return values.combine_chunks()
    try:
        return values if isinstance(values, pa.Array) else pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError, UnicodeError) as error:
        raise PushInvalid(f"column {name!r} cannot be read: {error}") from None


def _is_kind_of(given: pa.DataType, wanted: pa.DataType) -> bool:
    """Return whether values of the type `given` can be converted to the type `wanted`, if they are in its range."""
    if pa.types.is_null(given) or given == wanted:
        return True
    if pa.types.is_list(wanted):
        lists = pa.types.is_list(given) or pa.types.is_large_list(given) or pa.types.is_fixed_size_list(given)
        return bool(lists) and _is_kind_of(given.value_type, wanted.value_type)
    if pa.types.is_floating(wanted):
        return bool(pa.types.is_floating(given) or pa.types.is_integer(given))
    if pa.types.is_integer(wanted):
        return bool(pa.types.is_integer(given) or pa.types.is_floating(given))
    if pa.types.is_binary(wanted):
        return bool(pa.types.is_large_binary(given) or pa.types.is_fixed_size_binary(given))
    return bool(pa.types.is_string(wanted) and (pa.types.is_large_string(given) or pa.types.is_string_view(given)))


def _cast(name: str, wanted: str, array: pa.Array, to: pa.DataType) -> pa.Array:
    if array.type == to:
        return array
    try:
        cast = array.cast(to)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise PushInvalid(f"column {name!r} must be {wanted}: {error}") from None
    if to == pa.float32() and pc.sum(pc.is_inf(cast)).as_py() != pc.sum(pc.is_inf(array.cast(pa.float64()))).as_py():
        raise PushInvalid(f"column {name!r} must be {wanted}: a value in it is too large for this type")
    return cast
