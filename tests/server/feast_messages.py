"""The messages of Feast's serving protocol, written down a second time, to read the bytes as Feast's clients do."""

from typing import Any

from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.timestamp_pb2 import DESCRIPTOR as TIMESTAMP

# Message → its fields: number, name and type. A trailing * marks a repeated field, a trailing ? a member of the oneof.
_MESSAGES: dict[str, list[tuple[int, str, str]]] = {
    "BytesList": [(1, "val", "bytes*")],
    "StringList": [(1, "val", "string*")],
    "Int64List": [(1, "val", "int64*")],
    "FloatList": [(1, "val", "float*")],
    "Value": [
        (1, "bytes_val", "bytes?"),
        (2, "string_val", "string?"),
        (3, "int32_val", "int32?"),
        (4, "int64_val", "int64?"),
        (5, "double_val", "double?"),
        (6, "float_val", "float?"),
        (7, "bool_val", "bool?"),
        (8, "unix_timestamp_val", "int64?"),
        (12, "string_list_val", "StringList?"),
        (14, "int64_list_val", "Int64List?"),
        (16, "float_list_val", "FloatList?"),
    ],
    "RepeatedValue": [(1, "val", "Value*")],
    "FeatureList": [(1, "val", "string*")],
    "Entity": [(1, "key", "string"), (2, "value", "RepeatedValue")],
    "GetOnlineFeaturesRequest": [
        (1, "feature_service", "string?"),
        (2, "features", "FeatureList?"),
        (3, "entities", "Entity*"),
        (4, "full_feature_names", "bool"),
        (5, "request_context", "Entity*"),
        (6, "include_feature_view_version_metadata", "bool"),
    ],
    "FeatureVector": [
        (1, "values", "Value*"),
        (2, "statuses", "FieldStatus*"),
        (3, "event_timestamps", "google.protobuf.Timestamp*"),
    ],
    "FeatureViewMetadata": [(1, "name", "string"), (2, "version", "int32")],
    "Metadata": [(1, "feature_names", "FeatureList"), (2, "feature_view_metadata", "FeatureViewMetadata*")],
    "GetOnlineFeaturesResponse": [(1, "metadata", "Metadata"), (2, "results", "FeatureVector*"), (3, "status", "bool")],
    "GetFeastServingInfoResponse": [(1, "version", "string")],
}
_STATUSES = ("INVALID", "PRESENT", "NULL_VALUE", "NOT_FOUND", "OUTSIDE_MAX_AGE")


def _describe(name: str, fields: list[tuple[int, str, str]]) -> DescriptorProto:
    message = DescriptorProto(name=name)
    for number, field_name, text in fields:
        kind = text.rstrip("*?")
        field = message.field.add(name=field_name, number=number)
        field.label = field.LABEL_REPEATED if text.endswith("*") else field.LABEL_OPTIONAL
        if hasattr(FieldDescriptorProto, f"TYPE_{kind.upper()}"):
            field.type = getattr(FieldDescriptorProto, f"TYPE_{kind.upper()}")
        else:
            field.type = field.TYPE_ENUM if kind == "FieldStatus" else field.TYPE_MESSAGE
            field.type_name = f".{kind}" if "." in kind else f".seen.{kind}"
        if text.endswith("?"):
            field.oneof_index = 0
            if not message.oneof_decl:
                message.oneof_decl.add(name="kind")
    return message


def _pool() -> DescriptorPool:
    file = FileDescriptorProto(name="seen.proto", package="seen", syntax="proto3", dependency=[TIMESTAMP.name])
    file.message_type.extend(_describe(name, fields) for name, fields in _MESSAGES.items())
    statuses = file.enum_type.add(name="FieldStatus")
    for number, name in enumerate(_STATUSES):
        statuses.value.add(name=name, number=number)
    pool = DescriptorPool()
    pool.AddSerializedFile(TIMESTAMP.serialized_pb)
    pool.Add(file)
    return pool


_POOL = _pool()


def encode(message: str, document: dict[str, Any]) -> bytes:
    """Return the bytes of a message that is given in the JSON format of Protocol Buffers."""
    data: bytes = ParseDict(document, _class(message)()).SerializeToString()
    return data


def decode(message: str, data: bytes) -> dict[str, Any]:
    """Return a message in the JSON format of Protocol Buffers."""
    document: dict[str, Any] = MessageToDict(_class(message).FromString(data), preserving_proto_field_name=True)
    return document


def _class(message: str) -> Any:
    return GetMessageClass(_POOL.FindMessageTypeByName(f"seen.{message}"))
