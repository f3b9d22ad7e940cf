"""Read the requests of Feast's serving protocol over gRPC.

This module declares the parts of Feast's messages that Shoal reads, with Feast's field names and numbers. The
declarations have their own descriptor pool, because Feast's package may be loaded in the same process. Two fields have
another type than in Feast, with the same encoding on the wire. The map of entities is a repeated message of a key and a
value, which keeps the client's order. The list of a join key's values stays encoded, because the answer repeats this
list unchanged.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from shoal.engine.base.errors import LookupInvalid
from shoal.engine.kernels import protobuf
from shoal.engine.kernels.protobuf import Field
from shoal.engine.server.requests import check_count

_TEXT = FieldDescriptorProto.TYPE_STRING
_BYTES = FieldDescriptorProto.TYPE_BYTES
_BOOL = FieldDescriptorProto.TYPE_BOOL
_INT32 = FieldDescriptorProto.TYPE_INT32
_INT64 = FieldDescriptorProto.TYPE_INT64

_LEAST_KEY_BYTES = 4
_MAX_TEXT = 2**31 - 1
_KEY_FIELDS = ("string_val", "int64_val", "int32_val")


@dataclass(frozen=True)
class OnlineFeaturesRequest:
    """A GetOnlineFeatures request: `wanted` is a feature service or a list of features, and each value of `entities` is
    an encoded Feast `RepeatedValue`."""

    wanted: str | list[str]
    entities: dict[str, bytes]
    full_feature_names: bool
    name_views: bool


def parse_grpc_request(data: bytes) -> OnlineFeaturesRequest:
    """Return the request in `data`.

    Raises:
        LookupInvalid: the request cannot be decoded, or names no features and no feature service.
        RequestTooLarge: the request names too many features or entities.
    """
    request = _decode(_REQUEST, data, "the request")
    check_count("features", request.features.val)
    check_count("entities", request.entities)
    wanted = request.feature_service or list(request.features.val)
    if not wanted:
        raise LookupInvalid("give either features, a list of view:feature, or feature_service")
    return OnlineFeaturesRequest(
        wanted=wanted,
        entities={entry.key: entry.value for entry in request.entities},
        full_feature_names=request.full_feature_names,
        name_views=request.include_feature_view_version_metadata,
    )


def parse_keys(name: str, data: bytes) -> Any:
    """Return the values of the join key `name`: a list, a NumPy array or an Arrow array.

    Raises:
        LookupInvalid: the values cannot be decoded, or do not all have the same type, one of `_KEY_FIELDS`.
    """
    keys = _read_keys(np.frombuffer(data, np.uint8))
    return keys if keys is not None else _parse_any_keys(name, data)


def _read_keys(data: npt.NDArray[np.uint8]) -> Any:
    """Read keys with a kernel, if they have the usual encoding of protobuf libraries. Making one Python object per key
    would take longer than the lookup. Return None if the keys have another encoding, or are invalid."""
    most = data.size // _LEAST_KEY_BYTES
    if not 0 < data.size <= _MAX_TEXT:
        return None
    offsets = np.empty(most + 1, np.int32)
    text = np.empty(data.size, np.uint8)
    count = protobuf.read_strings(data, offsets, text)
    if count >= 0:
        strings = pa.StringArray.from_buffers(count, pa.py_buffer(offsets), pa.py_buffer(text))
        try:
            strings.validate(full=True)  # Checks that the strings are UTF-8.
        except pa.ArrowInvalid:
            return None
        return strings
    numbers = np.empty(most, np.int64)
    for field in (Field.INT64, Field.INT32):
        count = protobuf.read_integers(data, int(field), numbers)
        if count >= 0:
            return numbers[:count]
    return None


def _parse_any_keys(name: str, data: bytes) -> list[Any]:
    values = _decode(_REPEATED_VALUE, data, f"entity {name!r}").val
    kinds = {value.WhichOneof("val") for value in values}
    for kind in _KEY_FIELDS:
        if kinds <= {kind}:
            return [getattr(value, kind) for value in values]
    position, kind = next(_strange(values))
    raise LookupInvalid(
        f"entity {name!r} has {kind} in row {position}; give one of {', '.join(_KEY_FIELDS)}, the same in all rows"
    )


def _strange(values: Any) -> Iterator[tuple[int, str]]:
    """Yield the position and type of each value that is not a key, or has another type than the first value."""
    first = values[0].WhichOneof("val")
    for position, value in enumerate(values):
        kind = value.WhichOneof("val")
        if kind is None or kind != first:
            yield position, kind or "no key"


def _decode(message: Any, data: bytes, what: str) -> Any:
    try:
        return message.FromString(data)
    except DecodeError as error:
        raise LookupInvalid(f"{what} cannot be decoded: {error}") from None


def _message(name: str, *fields: FieldDescriptorProto, oneof: str | None = None) -> DescriptorProto:
    message = DescriptorProto(name=name, field=fields)
    if oneof is not None:
        message.oneof_decl.add(name=oneof)
    return message


def _field(
    name: str, number: int, field_type: int | str, *, repeated: bool = False, in_oneof: bool = False
) -> FieldDescriptorProto:
    """Return a field. A `field_type` that is a string is the name of a message type."""
    label = FieldDescriptorProto.LABEL_REPEATED if repeated else FieldDescriptorProto.LABEL_OPTIONAL
    field = FieldDescriptorProto(name=name, number=number, label=label)
    if isinstance(field_type, str):
        field.type = FieldDescriptorProto.TYPE_MESSAGE
        field.type_name = f".feast.{field_type}"
    else:
        field.type = field_type
    if in_oneof:
        field.oneof_index = 0
    return field


_FILE = FileDescriptorProto(
    name="feast.proto",
    package="feast",
    syntax="proto3",
    message_type=[
        _message(
            "Value",
            _field("string_val", 2, _TEXT, in_oneof=True),
            _field("int32_val", 3, _INT32, in_oneof=True),
            _field("int64_val", 4, _INT64, in_oneof=True),
            oneof="val",
        ),
        _message("RepeatedValue", _field("val", 1, "Value", repeated=True)),
        _message("FeatureList", _field("val", 1, _TEXT, repeated=True)),
        _message("Entity", _field("key", 1, _TEXT), _field("value", 2, _BYTES)),
        _message(
            "GetOnlineFeaturesRequest",
            _field("feature_service", 1, _TEXT, in_oneof=True),
            _field("features", 2, "FeatureList", in_oneof=True),
            _field("entities", 3, "Entity", repeated=True),
            _field("full_feature_names", 4, _BOOL),
            _field("include_feature_view_version_metadata", 6, _BOOL),
            oneof="kind",
        ),
    ],
)
_POOL = DescriptorPool()
_POOL.Add(_FILE)
_REQUEST: Any = GetMessageClass(_POOL.FindMessageTypeByName("feast.GetOnlineFeaturesRequest"))
_REPEATED_VALUE: Any = GetMessageClass(_POOL.FindMessageTypeByName("feast.RepeatedValue"))
