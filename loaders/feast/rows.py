"""Convert Feast's feature views, entity keys and values to the forms that a Shoal store uses, and convert values back.

Types that Shoal lacks (maps, sets, other lists, JSON and the like) are stored as the bytes of Feast's own message. So
Feast reads back the values that it wrote, and Shoal's own clients get bytes.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from feast.protos.feast.types import Value_pb2 as values
from google.protobuf.message import DecodeError

from shoal.engine.base.errors import PushInvalid, Unmappable
from shoal.engine.base.quoting import abbreviated
from shoal.engine.base.times import (
    ALLOWED_YEARS,
    FIRST_TIME,
    FURTHEST_AHEAD,
    LAST_TIME,
    from_seconds,
    to_micros,
)
from shoal.engine.format.feast_values import MEMBERS
from shoal.engine.format.schema import Feature, JoinKey, ViewSchema
from shoal.engine.push.pushed_rows import EVENT_TIME_COLUMN

Row = tuple[Any, Mapping[str, Any], datetime, datetime | None]
"""A row as Feast writes it: entity key, values by feature, event time, and creation time."""

NO_ENTITY = "no_entity"
"""The join key of a view without entities. Its only value is the empty string."""
_FEASTS_NO_ENTITY = "__dummy_id"

_KEY_TYPES = {"String": "string", "Int64": "int64", "Int32": "int64"}
_TYPES = {
    "Int32": "int32",
    "Int64": "int64",
    "Float32": "float32",
    "Float64": "float64",
    "String": "string",
    "Bytes": "bytes",
    "Bool": "bool",
    "UnixTimestamp": "timestamp",
    "Array(Int64)": "list<int64>",
    "Array(Float32)": "list<float32>",
    "Array(String)": "list<string>",
}
_MEMBERS = {
    "Int32": "int32_val",
    "Int64": "int64_val",
    "Float32": "float_val",
    "Float64": "double_val",
    "String": "string_val",
    "Bytes": "bytes_val",
    "Bool": "bool_val",
}
_LISTS: dict[str, Callable[[Any], Any]] = {
    "Array(Int64)": lambda items: values.Value(int64_list_val=values.Int64List(val=items)),
    "Array(Float32)": lambda items: values.Value(float_list_val=values.FloatList(val=items)),
    "Array(String)": lambda items: values.Value(string_list_val=values.StringList(val=items)),
}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_NOT_A_TIME = -(2**63)


def schema_of(view: Any) -> ViewSchema:
    """Return the schema of a Feast feature view.

    Raises:
        Unmappable: a name, or the type of a join key, has no counterpart in Shoal.
    """
    keys = [_join_key(view.name, column) for column in view.entity_columns if column.name != _FEASTS_NO_ENTITY]
    source: Any = getattr(view, "batch_source", None)
    stream: Any = getattr(view, "stream_source", None)
    try:
        return ViewSchema(
            name=view.name,
            join_keys=tuple(keys) or (JoinKey(name=NO_ENTITY, type="string"),),
            features=tuple(_feature(one) for one in stored_fields(view)),
            ttl=getattr(view, "ttl", None) or None,
            timestamp_field=getattr(source, "timestamp_field", None) or None,
            push_source=stream.name if type(stream).__name__ == "PushSource" else None,
        )
    except ValueError as error:
        raise Unmappable(f"feature view {view.name!r} cannot be kept in a Shoal store: {error}") from None


def stored_fields(view: Any) -> list[Any]:
    """Return the features of a Feast feature view that the store holds. Features with the name of a join key are left
    out, because their values are in the key."""
    keys = {column.name for column in view.entity_columns}
    return [field for field in view.features if field.name not in keys]


def _feature(field: Any) -> Feature:
    declared = str(field.dtype)
    if declared in _TYPES:
        return Feature(name=field.name, type=_TYPES[declared])
    return Feature(name=field.name, type="bytes", feast_member=_member_of(field.dtype))


def _member_of(declared: Any) -> str | None:
    """Return the member of Feast's `Value` that holds values of a declared type, or None if this version of Shoal does
    not know the member."""
    # Feast gives its types the numbers of the members of `Value`. Types without a member are kept as bytes.
    member = values.Value.DESCRIPTOR.fields_by_number.get(declared.to_value_type().value)
    name = member.name if member is not None else "bytes_val"
    return name if name in MEMBERS else None


def _join_key(view: str, column: Any) -> JoinKey:
    declared = str(column.dtype)
    if declared not in _KEY_TYPES:
        raise Unmappable(
            f"join key {column.name!r} of feature view {view!r} is of type {declared}; declare it String, Int64 or "
            f"Int32"
        )
    try:
        return JoinKey.model_validate({"name": column.name, "type": _KEY_TYPES[declared]})
    except ValueError:
        raise Unmappable(
            f"join key {column.name!r} of feature view {view!r} has an invalid name; use a letter, then letters, "
            f"digits and underscores"
        ) from None


def key_columns(schema: ViewSchema, entity_keys: Sequence[Any]) -> dict[str, list[Any]]:
    """Return entity keys as columns, one per join key."""
    if schema.join_keys[0].name == NO_ENTITY:
        return {NO_ENTITY: [""] * len(entity_keys)}
    columns: dict[str, list[Any]] = {key.name: [] for key in schema.join_keys}
    for entity in entity_keys:
        given = {name: _plain(value) for name, value in zip(entity.join_keys, entity.entity_values, strict=True)}
        for name, column in columns.items():
            column.append(given.get(name))
    return columns


def columns_of(schema: ViewSchema, view: Any, rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Return rows as columns to push, in the order of event time, then creation time.

    A feature without a value in any row is left out.

    Raises:
        PushInvalid: a time is outside the years 1 to 9999, an event time is more than a day in the future, or a value
            does not have the declared type.
    """
    rows = sorted(rows, key=lambda row: (_aware(row[2]), _aware(row[3]) if row[3] is not None else _EPOCH))
    columns = key_columns(schema, [row[0] for row in rows])
    columns[EVENT_TIME_COLUMN] = [_event_time(schema.name, row) for row in rows]
    for field in stored_fields(view):
        given = [row[1].get(field.name) for row in rows]
        if any(value is not None for value in given):
            write = _writer(field)
            columns[field.name] = [
                write(value, row) if _is_set(value) else None for value, row in zip(given, rows, strict=True)
            ]
    return columns


def reader(field: Any) -> Callable[[Any], Any]:
    """Return a function that converts a field's stored value, or None, to Feast's message."""
    declared = str(field.dtype)
    member = _MEMBERS.get(declared)
    if member is not None:
        name = str(member)
        return lambda value: values.Value() if value is None else values.Value(**{name: value})
    if declared == "UnixTimestamp":
        return lambda value: values.Value() if value is None else values.Value(unix_timestamp_val=_seconds(value))
    if declared in _LISTS:
        make = _LISTS[declared]
        return lambda value: values.Value() if value is None else make(value)
    return lambda value: values.Value() if value is None else _stored_message(field, value)


def _stored_message(field: Any, stored: bytes) -> Any:
    """Parse stored bytes as a message. Return an empty message, which means null, if the bytes are not a message of the
    declared type: older versions of Shoal accepted any bytes."""
    try:
        value = values.Value.FromString(stored)
    except DecodeError:
        return values.Value()
    return value if _member_of(field.dtype) in (None, value.WhichOneof("val")) else values.Value()


def _writer(field: Any) -> Callable[[Any, Row], Any]:
    """Return a function that converts Feast's message to a value to store. Its second argument is the message's row.

    Raises (the returned function):
        PushInvalid: the value does not have the declared type.
    """
    declared = str(field.dtype)
    if declared == "UnixTimestamp":
        return lambda value, row: _time(field, value, row)
    if declared in _LISTS:
        return lambda value, row: list(_of_type(field, value, row).val)
    if declared in _MEMBERS:
        return lambda value, row: _plain(value)
    return lambda value, row: _message(field, value, row)


def _message(field: Any, value: Any, row: Row) -> bytes:
    _of_type(field, value, row)
    data: bytes = value.SerializeToString()
    return data


def _of_type(field: Any, value: Any, row: Row) -> Any:
    """Return the value of a message. Raise PushInvalid if the value does not have the declared type."""
    found = value.WhichOneof("val")
    wanted = _member_of(field.dtype)
    if wanted is not None and found != wanted:
        raise PushInvalid(
            f"feature {field.name!r} is {field.dtype} and needs {wanted} values, but the row of {_shown_key(row)} has "
            f"{found}; correct the value, or the type in the feature view"
        )
    return _plain(value)


def _shown_key(row: Row) -> str:
    """Return a row's entity key as text for a message."""
    pairs = zip(row[0].join_keys, row[0].entity_values, strict=True)
    return ", ".join(f"{name} {abbreviated(_plain(value))}" for name, value in pairs) or "the only key"


def _plain(value: Any) -> Any:
    member = value.WhichOneof("val")
    return getattr(value, member) if member else None


def _is_set(value: Any) -> bool:
    return value is not None and value.WhichOneof("val") not in (None, "null_val")


def _time(field: Any, value: Any, row: Row) -> datetime | None:
    seconds = _of_type(field, value, row)
    if seconds == _NOT_A_TIME:
        return None
    time = from_seconds(seconds)
    if time is None:
        raise PushInvalid(
            f"feature {field.name!r} holds {seconds} seconds since 1970 in the row of {_shown_key(row)}; give times in "
            f"{ALLOWED_YEARS}"
        )
    return time


def _event_time(view: str, row: Row) -> datetime:
    """Return the event time of a row. Raise PushInvalid if it is outside the allowed years, or more than a day in the
    future."""
    time = _aware(row[2])
    micros = to_micros(time)
    if not FIRST_TIME <= micros <= LAST_TIME or micros > to_micros(datetime.now(UTC) + FURTHEST_AHEAD):
        raise PushInvalid(
            f"feature view {view!r}: the row of {_shown_key(row)} has the event time {time.isoformat()}; give times in "
            f"{ALLOWED_YEARS}, and at most one day in the future"
        )
    return time


def _seconds(time: datetime) -> int:
    return (time - _EPOCH) // timedelta(seconds=1)


def _aware(time: datetime) -> datetime:
    """Return a time with its time zone. Feast's own times have no zone and are in UTC."""
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time
