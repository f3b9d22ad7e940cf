"""Answers, pushes and rows in Arrow. Other modules import this module, and PyArrow, only when a caller uses Arrow. So
the client works without PyArrow for the formats npy and json.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shoal.client.answers import Answer
from shoal.client.errors import AnswerInvalid, FormMissing


@dataclass(frozen=True)
class ArrowAnswer(Answer):
    """An answer in the form of an Arrow stream. `body` is the memory that contains all of the batch's columns; empty if
    there is no such single piece of memory."""

    batch: pa.RecordBatch
    body: bytes = b""

    def to_arrow(self) -> pa.RecordBatch:
        return self.batch

    def to_pandas(self) -> Any:
        import pandas

        nullable = {
            pa.int32(): pandas.Int32Dtype(),
            pa.int64(): pandas.Int64Dtype(),
            pa.bool_(): pandas.BooleanDtype(),
        }
        return self.to_arrow().to_pandas(types_mapper=nullable.get)

    def to_numpy(self) -> npt.NDArray[Any]:
        columns = [_numbers(name, column) for name, column in zip(self.batch.schema.names, self.batch, strict=True)]
        wide = any(_needs_double(column.type) for column in self.batch)
        dtype = np.dtype(np.float64 if wide else np.float32)
        as_they_lie = _view_of(columns, dtype, self.body)
        if as_they_lie is not None:
            return as_they_lie
        matrix = np.empty((self.batch.num_rows, sum(column.shape[1] for column in columns)), dtype)
        position = 0
        for column in columns:
            matrix[:, position : position + column.shape[1]] = column
            position += column.shape[1]
        return matrix

    def to_pydict(self) -> dict[str, list[Any]]:
        try:
            return self.batch.to_pydict()  # type: ignore[no-any-return]
        except (pa.ArrowException, ArithmeticError, ValueError, LookupError) as error:
            raise AnswerInvalid(f"a server sent a value that Python cannot represent: {error}") from error


def read_batch(body: bytes) -> pa.RecordBatch:
    """Return the only record batch of an Arrow stream.

    Raises:
        ValueError: the stream is invalid.
    """
    try:
        with pa.ipc.open_stream(body) as stream:
            batch = stream.read_next_batch()
            if any(True for _ in stream):
                raise ValueError("it has more than one record batch")
        # Check the offsets: if an offset were outside of its buffer, Arrow would read other memory.
        batch.validate(full=True)
    except pa.ArrowException as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return batch


def write_batch(batch: pa.RecordBatch) -> bytes:
    """Return a record batch as an Arrow stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def one_batch(rows: pa.Table | pa.RecordBatch) -> pa.RecordBatch:
    """Return a table's rows as one record batch; return a record batch unchanged."""
    if isinstance(rows, pa.RecordBatch):
        return rows
    batches = rows.combine_chunks().to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=rows.schema)


def take_rows(rows: pa.Table | pa.RecordBatch, numbers: npt.NDArray[np.int64]) -> Any:
    """Return the rows of a table or batch at the positions `numbers`, as a table or batch."""
    return rows.take(pa.array(numbers))


def with_time(batch: pa.RecordBatch, name: str, time: datetime) -> pa.RecordBatch:
    """Return a batch with one more column that contains the same time in each row."""
    return batch.append_column(name, pa.array([time] * batch.num_rows, pa.timestamp("us", tz="UTC")))


def _needs_double(kind: pa.DataType) -> bool:
    """Return whether float32 cannot hold all values of a type."""
    if pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    return not (pa.types.is_float32(kind) or pa.types.is_boolean(kind))


def _numbers(name: str, column: pa.Array) -> npt.NDArray[Any]:
    """Return a column as numbers [keys, width], with NaN for absent values; a view of the column's memory if
    possible."""
    kind = column.type
    width = 1
    nulls = column.is_null().to_numpy(zero_copy_only=False) if column.null_count else None
    if pa.types.is_fixed_size_list(kind) and pa.types.is_floating(kind.value_type):
        width = kind.list_size
        # A null embedding also has numbers in memory; their values are arbitrary.
        values = column.values.slice(column.offset * width, len(column) * width)
    elif pa.types.is_timestamp(kind):
        values = pc.divide(column.cast(pa.int64()).cast(pa.float64(), safe=False), 1e6)
    elif pa.types.is_boolean(kind):
        values = column.cast(pa.float32())
    elif pa.types.is_integer(kind):
        values = _exact(name, column)
    elif pa.types.is_floating(kind):
        values = column
    else:
        raise FormMissing(f"{name} is {kind}, which has no place in a matrix; use to_arrow")
    numbers: npt.NDArray[Any] = values.to_numpy(zero_copy_only=False).reshape(len(column), width)
    if nulls is not None:
        numbers = numbers.astype(np.float64 if _needs_double(kind) else np.float32)
        numbers[nulls] = np.nan
    return numbers


def _exact(name: str, integers: pa.Array) -> pa.Array:
    """Return integers as float64; raise FormMissing if float64 cannot hold one of them exactly."""
    try:
        return integers.cast(pa.float64())
    except pa.ArrowInvalid as error:
        raise FormMissing(
            f"{name} has an integer beyond ±2^53, which a matrix of float64 cannot hold exactly ({error}); "
            f"use to_arrow, to_pandas or to_pydict"
        ) from None


def _view_of(columns: list[npt.NDArray[Any]], dtype: np.dtype[Any], body: bytes) -> npt.NDArray[Any] | None:
    """Return columns as one matrix without a copy; None if their memory does not allow that.

    The columns must lie in `body` at equal distances, like the columns of a matrix. In a server's answer, the columns
    lie in this way if no value is null."""
    if any(column.dtype != dtype or not column.flags.c_contiguous for column in columns):
        return None
    first = columns[0]
    if len(columns) == 1:
        return first
    if any(column.shape[1] != 1 for column in columns) or not first.size or not body:
        return None
    offsets = np.array([_address(column) for column in columns]) - _address(np.frombuffer(body, np.uint8))
    steps = np.diff(offsets)
    if (steps != steps[0]).any() or offsets[0] < 0 or steps[0] < first.nbytes or offsets[-1] + first.nbytes > len(body):
        return None
    strides = (dtype.itemsize, int(steps[0]))
    return np.ndarray((first.size, len(columns)), dtype, body, int(offsets[0]), strides)


def _address(array: npt.NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])
