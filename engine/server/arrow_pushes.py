"""Read rows that are pushed as an Arrow IPC stream, and reject streams that unpack to more than the server's limits.

A stream may be far smaller than its unpacked rows: its buffers may be compressed, and some types repeat a value. So the
size in memory is added up before any buffer is unpacked. Source: Apache Arrow Columnar Format, "Serialization and
Interprocess Communication", and its Message.fbs.
"""

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shoal.engine.base.errors import PushInvalid, RequestTooLarge

# The numbers of table fields in Message.fbs.
_MESSAGE_HEADER = 2
_BATCH_LENGTH, _BATCH_BUFFERS, _BATCH_COMPRESSION = 0, 2, 3
_DICTIONARY_DATA = 1

_NOT_COMPRESSED = -1


def arrow_columns(body: bytes, *, max_rows: int, max_bytes: int) -> dict[str, Any]:
    """Return the columns of a stream, by name.

    Args:
        max_rows: the maximum number of rows.
        max_bytes: the maximum size of the unpacked buffers in bytes.

    Raises:
        PushInvalid: the body is not an Arrow stream, or two columns have the same name.
        RequestTooLarge: the stream has more rows or bytes than the maximum.
    """
    try:
        _check_size(body, max_rows, max_bytes)
        with pa.ipc.open_stream(body) as stream:
            table = stream.read_all()
        table.validate(full=True)
        names = table.column_names
        columns = [column.combine_chunks() for column in table.columns]
    except (pa.ArrowException, OSError, UnicodeDecodeError, struct.error) as error:
        raise PushInvalid(f"the body is not an Arrow stream: {error}") from None
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
                f"the push has {rows} rows, the server accepts at most {max_rows}; push in parts, or raise its max_keys"
            )
        _check_bytes(size, max_bytes)


def _check_bytes(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise RequestTooLarge(
            f"the stream unpacks to {size} bytes, the server accepts at most {max_bytes}; push in parts, or raise its "
            f"max_body_bytes"
        )


def _repeated_bytes(values: pa.Array) -> int:
    """Return the size in bytes that a column's strings or bytes values have when each value is copied separately.
    Return 0 if the column's type cannot repeat a value."""
    if pa.types.is_dictionary(values.type):
        lengths = pa.array(_lengths(values.dictionary))
        return int(pc.sum(lengths.take(values.indices)).as_py() or 0)
    if pa.types.is_string_view(values.type) or pa.types.is_binary_view(values.type):
        return int(_lengths(values).sum())
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type) or pa.types.is_fixed_size_list(values.type):
        return _repeated_bytes(values.flatten())
    return 0


def _lengths(values: pa.Array) -> npt.NDArray[np.int64]:
    """Return the size of each string or bytes value in bytes; 0 for other types."""
    if pa.types.is_string_view(values.type) or pa.types.is_binary_view(values.type):
        # A view has 16 bytes, and the first four bytes are the length of the value. No Arrow kernel returns this
        # length.
        views = np.frombuffer(values.buffers()[1], np.int32)[: 4 * (values.offset + len(values))]
        return np.where(values.is_valid(), views[4 * values.offset :: 4], 0).astype(np.int64)
    try:
        return pc.binary_length(values).fill_null(0).to_numpy().astype(np.int64)  # type: ignore[no-any-return]
    except pa.ArrowNotImplementedError:
        return np.zeros(len(values), np.int64)


def _unpacked_sizes(batch: "_Table", body: memoryview) -> Iterator[int]:
    """Yield the unpacked size in bytes that each buffer of a compressed batch declares."""
    for offset, length in batch.pairs(_BATCH_BUFFERS):
        if length >= 8:
            (size,) = struct.unpack_from("<q", body, offset)
            yield length if size == _NOT_COMPRESSED else size


class _Table:
    """A reader for a table of a flatbuffer that Arrow has verified. It supports only what the computation of the sizes
    needs."""

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
        """Return the position of a field; 0 if the table does not have the field."""
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
        """Yield the elements of a vector of structs with two int64 fields each."""
        place = self._place(field)
        if place:
            start = place + self._read("<I", place)
            for number in range(self._read("<I", start)):
                yield self._read("<q", start + 4 + 16 * number), self._read("<q", start + 12 + 16 * number)
