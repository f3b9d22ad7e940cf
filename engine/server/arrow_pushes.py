"""Rows that are pushed as an Arrow IPC stream: read, but for streams that would unpack to more than the server takes.

A stream may be far smaller than what it says: its buffers may be compressed, and some types repeat a value. What it
takes in memory is added up before any of it is unpacked. Source: Apache Arrow Columnar Format, "Serialization and
Interprocess Communication", and its Message.fbs.
"""

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

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
        names, columns = table.column_names, [column.combine_chunks() for column in table.columns]
    except (pa.ArrowException, OSError, UnicodeDecodeError, struct.error) as error:
        raise PushInvalid(f"the body is no Arrow stream: {error}") from None
    _check_bytes(sum(map(_repeated_bytes, columns)), max_bytes)
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
        _check_bytes(size, max_bytes)


def _check_bytes(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise RequestTooLarge(
            f"the stream unpacks to {size} bytes, the server takes {max_bytes}; push in parts, or raise its "
            f"max_body_bytes"
        )


def _repeated_bytes(values: pa.Array) -> int:
    """What texts and bytes of the types that may repeat one, dictionaries and views, take when each is written out."""
    if pa.types.is_dictionary(values.type):
        lengths = pa.array(_lengths(values.dictionary))
        return int(pc.sum(lengths.take(values.indices)).as_py() or 0)
    if pa.types.is_string_view(values.type) or pa.types.is_binary_view(values.type):
        return int(_lengths(values).sum())
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type) or pa.types.is_fixed_size_list(values.type):
        return _repeated_bytes(values.flatten())
    return 0


def _lengths(values: pa.Array) -> npt.NDArray[np.int64]:
    """The bytes of each text, or bytes, of an array; 0 of what is neither."""
    if pa.types.is_string_view(values.type) or pa.types.is_binary_view(values.type):
        # A view is 16 bytes, of which the first four are the length; no kernel of Arrow's tells it.
        views = np.frombuffer(values.buffers()[1], np.int32)[: 4 * (values.offset + len(values))]
        return np.where(values.is_valid(), views[4 * values.offset :: 4], 0).astype(np.int64)
    try:
        return pc.binary_length(values).fill_null(0).to_numpy().astype(np.int64)  # type: ignore[no-any-return]
    except pa.ArrowNotImplementedError:
        return np.zeros(len(values), np.int64)


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
