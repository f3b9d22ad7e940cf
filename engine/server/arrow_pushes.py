"""Rows that are pushed as an Arrow IPC stream: read, but for streams that would unpack to more than the server takes.

A stream may be far smaller than what it says: its buffers may be compressed, and some types repeat a value. What it
takes in memory is added up before any of it is unpacked. Source: Apache Arrow Columnar Format, "Serialization and
Interprocess Communication", and its Message.fbs.
"""

import struct
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from engine.errors import PushInvalid, RequestTooLarge

# The fields of tables in Message.fbs, by their number.
_MESSAGE_HEADER = 2
_BATCH_LENGTH, _BATCH_BUFFERS, _BATCH_COMPRESSION = 0, 2, 3
_DICTIONARY_DATA = 1

_NOT_COMPRESSED = -1


def arrow_columns(body: bytes, *, max_rows: int, max_bytes: int) -> dict[str, Any]:
    """The columns of a stream, by name.

    Args:
        max_rows: the most rows that it may have.
        max_bytes: the most bytes that it may have when its buffers are unpacked.

    Raises:
        PushInvalid: it is no Arrow stream, or names a column twice.
        RequestTooLarge: it has more rows or bytes.
    """
    try:
        _check_size(body, max_rows, max_bytes)
        with pa.ipc.open_stream(body) as stream:
            table = stream.read_all()
        table.validate(full=True)
        names, columns = table.column_names, table.combine_chunks().columns
    except (pa.ArrowException, OSError, UnicodeDecodeError, struct.error) as error:
        raise PushInvalid(f"the body is no Arrow stream: {error}") from None
    for name in names:
        if names.count(name) > 1:
            raise PushInvalid(f"the stream has {names.count(name)} columns {name!r}; send one")
    return dict(zip(names, columns, strict=True))


def _check_size(body: bytes, max_rows: int, max_bytes: int) -> None:
    rows = size = 0
    for message in pa.ipc.MessageReader.open_stream(body):
        if message.type not in ("record batch", "dictionary"):
            continue
        batch = _Table.root(message.metadata.to_pybytes()).table(_MESSAGE_HEADER)
        if message.type == "dictionary":
            batch = batch.table(_DICTIONARY_DATA)
        else:
            rows += batch.number(_BATCH_LENGTH)
        if batch.has(_BATCH_COMPRESSION):
            size += sum(_unpacked_sizes(batch, memoryview(message.body)))
        if rows > max_rows:
            raise RequestTooLarge(
                f"the push has {rows} rows, the server takes {max_rows}; push in parts, or raise its max_keys"
            )
        if size > max_bytes:
            raise RequestTooLarge(
                f"the stream unpacks to {size} bytes, the server takes {max_bytes}; push in parts, or raise its "
                f"max_body_bytes"
            )


def _unpacked_sizes(batch: "_Table", body: memoryview) -> Iterator[int]:
    """What each buffer of a compressed batch says that it unpacks to, in bytes."""
    for offset, length in batch.pairs(_BATCH_BUFFERS):
        if length >= 8:
            (size,) = struct.unpack_from("<q", body, offset)
            yield length if size == _NOT_COMPRESSED else size


class _Table:
    """A table of a flatbuffer that Arrow has verified: as much of one as it takes to find the sizes."""

    def __init__(self, data: bytes, position: int) -> None:
        self._data = data
        self._position = position
        self._fields = position - self._read("<i", position)

    @classmethod
    def root(cls, data: bytes) -> "_Table":
        return cls(data, struct.unpack_from("<I", data)[0])

    def _read(self, form: str, position: int) -> int:
        value: int = struct.unpack_from(form, self._data, position)[0]
        return value

    def _place(self, field: int) -> int:
        """Where a field is; 0 if the table has it not."""
        entry = 4 + 2 * field
        offset = self._read("<H", self._fields + entry) if entry < self._read("<H", self._fields) else 0
        return self._position + offset if offset else 0

    def has(self, field: int) -> bool:
        return self._place(field) > 0

    def number(self, field: int) -> int:
        place = self._place(field)
        return self._read("<q", place) if place else 0

    def table(self, field: int) -> "_Table":
        place = self._place(field)
        return _Table(self._data, place + self._read("<I", place))

    def pairs(self, field: int) -> Iterator[tuple[int, int]]:
        """A vector of structs of two int64."""
        place = self._place(field)
        if place:
            start = place + self._read("<I", place)
            for number in range(self._read("<I", start)):
                yield self._read("<q", start + 4 + 16 * number), self._read("<q", start + 12 + 16 * number)
