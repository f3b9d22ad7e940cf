"""Check Feast's message `Value` without the protobuf library, which is optional on a server.

A feature with a Feast type that Shoal lacks is stored as the bytes of such a message, always with the same member.
If the bytes were anything else, Feast would fail at every read of the row's key. So Shoal rejects all other bytes.

Source: Feast's feast/types/Value.proto (0.67); Protocol Buffers, "Encoding".
"""

import re
from collections.abc import Iterator, Mapping

_VARINT, _FIXED_64, _SIZED, _FIXED_32 = 0, 1, 2, 5
_TEXT, _BYTES = "text", "bytes"
_INTEGER, _DOUBLE, _FLOAT = "integer", "double", "float"
_WIRE_TYPES = {_INTEGER: _VARINT, _DOUBLE: _FIXED_64, _FLOAT: _FIXED_32}
_INTEGERS = re.compile(rb"(?:[\x80-\xff]{0,9}[\x00-\x7f])*", re.DOTALL)
_DEEPEST = 98
"""The maximum nesting depth of messages; the protobuf library accepts at most 100 levels."""

_MEMBERS: Mapping[str, tuple[int, str]] = {
    "bytes_val": (1, _BYTES),
    "string_val": (2, _TEXT),
    "int32_val": (3, _INTEGER),
    "int64_val": (4, _INTEGER),
    "double_val": (5, _DOUBLE),
    "float_val": (6, _FLOAT),
    "bool_val": (7, _INTEGER),
    "unix_timestamp_val": (8, _INTEGER),
    "bytes_list_val": (11, "many bytes"),
    "string_list_val": (12, "many text"),
    "int32_list_val": (13, "many integer"),
    "int64_list_val": (14, "many integer"),
    "double_list_val": (15, "many double"),
    "float_list_val": (16, "many float"),
    "bool_list_val": (17, "many integer"),
    "unix_timestamp_list_val": (18, "many integer"),
    "null_val": (19, _INTEGER),
    "map_val": (20, "Map"),
    "map_list_val": (21, "MapList"),
    "bytes_set_val": (22, "many bytes"),
    "string_set_val": (23, "many text"),
    "int32_set_val": (24, "many integer"),
    "int64_set_val": (25, "many integer"),
    "double_set_val": (26, "many double"),
    "float_set_val": (27, "many float"),
    "bool_set_val": (28, "many integer"),
    "unix_timestamp_set_val": (29, "many integer"),
    "json_val": (32, _TEXT),
    "json_list_val": (33, "many text"),
    "struct_val": (34, "Map"),
    "struct_list_val": (35, "MapList"),
    "uuid_val": (36, _TEXT),
    "time_uuid_val": (37, _TEXT),
    "uuid_list_val": (38, "many text"),
    "time_uuid_list_val": (39, "many text"),
    "uuid_set_val": (40, "many text"),
    "time_uuid_set_val": (41, "many text"),
    "list_val": (42, "many Value"),
    "set_val": (43, "many Value"),
    "decimal_val": (44, _TEXT),
    "decimal_list_val": (45, "many text"),
    "decimal_set_val": (46, "many text"),
    "scalar_map_val": (47, "ScalarMap"),
    "zoned_timestamp_val": (48, "ZonedTimestamp"),
}
"""The members of `Value`: their field numbers and the kinds of their contents."""

MEMBERS = frozenset(_MEMBERS)
"""The names of the members of `Value`."""

_MESSAGES: Mapping[str, Mapping[int, str]] = {
    "Value": dict(_MEMBERS.values()),
    **{f"many {kind}": {1: kind} for kind in (_BYTES, _TEXT, _INTEGER, _DOUBLE, _FLOAT, "Value")},
    "Map": {1: "MapEntry"},
    "MapEntry": {1: _TEXT, 2: "Value"},
    "MapList": {1: "Map"},
    "ScalarMap": {1: "ScalarMapEntry"},
    "ScalarMapEntry": {1: "MapKey", 2: "Value"},
    "MapKey": dict(enumerate([*[_INTEGER] * 2, _FLOAT, _DOUBLE, *[_INTEGER] * 2, _BYTES, *[_TEXT] * 3], 1)),
    "ZonedTimestamp": {1: _INTEGER, 2: _TEXT},
}
"""The kind of content of each field of each message, by field number."""
_PACKED = frozenset(f"many {kind}" for kind in _WIRE_TYPES)


class _Damaged(Exception):
    """The bytes are not a valid message."""


def is_value_of(data: bytes, member: str) -> bool:
    """Return whether bytes are a `Value` with exactly this member."""
    number, kind = _MEMBERS[member]
    try:
        fields = list(_fields(data))
        if len(fields) != 1 or fields[0][0] != number:
            return False
        _check_field(kind, *fields[0][1:], _DEEPEST, packed=False)
    except _Damaged:
        return False
    return True


def _check_message(name: str, data: bytes, depth: int) -> None:
    if not depth:
        raise _Damaged
    kinds = _MESSAGES[name]
    for number, wire_type, content in _fields(data):
        # Fields from a newer version of Feast are skipped, as in the protobuf library.
        if number in kinds:
            _check_field(kinds[number], wire_type, content, depth, packed=name in _PACKED)


def _check_field(kind: str, wire_type: int, content: bytes, depth: int, *, packed: bool) -> None:
    if packed and wire_type == _SIZED:
        _check_packed(kind, content)
    elif wire_type != _WIRE_TYPES.get(kind, _SIZED):
        raise _Damaged
    elif kind == _TEXT:
        try:
            content.decode()
        except UnicodeDecodeError:
            raise _Damaged from None
    elif kind in _MESSAGES:
        _check_message(kind, content, depth - 1)


def _check_packed(kind: str, content: bytes) -> None:
    """Check the content of a packed list: numbers without field keys between them."""
    whole = not len(content) % (8 if kind == _DOUBLE else 4)
    if kind == _INTEGER:
        whole = _INTEGERS.fullmatch(content) is not None
    if not whole:
        raise _Damaged


def _fields(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield the fields of a message: the number, the wire type, and the content without its length."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number = key >> 3
        wire_type = key & 7
        start = position
        if wire_type == _VARINT:
            _, position = _varint(data, position)
        elif wire_type == _SIZED:
            size, start = _varint(data, position)
            position = start + size
        elif wire_type in (_FIXED_64, _FIXED_32):
            position += 8 if wire_type == _FIXED_64 else 4
        else:
            raise _Damaged
        if not 0 < number < 1 << 29 or position > len(data):
            raise _Damaged
        yield number, wire_type, data[start:position]


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Return the varint (at most 64 bits) at a position, and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            break
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise _Damaged
