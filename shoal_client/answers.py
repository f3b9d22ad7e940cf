"""Answers to lookups, in the forms that a ranker takes, and to pushes.

The numbers stay in the memory that they came in: what `to_arrow` and `to_numpy` return are views of it where they can.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shoal_client.errors import AnswerInvalid, FormMissing


class Position(NamedTuple):
    """Where a view stands in its log: the seq of the last entry that its rows hold, and the beginning of its id."""

    seq: int
    entry: str

    def __str__(self) -> str:
        return f"{self.seq}@{self.entry}"


@dataclass(frozen=True)
class Pushed:
    """What became of a push: how many `rows` it had, how many were `superseded` by newer ones, and, by address, the
    version from which on each store shows it."""

    rows: int
    superseded: int
    versions: Mapping[str, int]


@dataclass(frozen=True)
class Answer:
    """The answer to a lookup. `version` is that of the store that it was read from; None where several shards were
    asked. `applied` says where each view stood in its log, `partial` of which views rows are missing, since they did
    not come in time from the table that they are kept in."""

    version: int | None
    applied: Mapping[str, Position]
    partial: tuple[str, ...]

    def to_arrow(self) -> pa.RecordBatch:
        """A column a feature, named `view:feature`, nulls as nulls."""
        raise self._lacks("to_arrow", "arrow")

    def to_pandas(self) -> Any:
        """Return a DataFrame; needs pandas. Integers and bools have pandas' nullable types (`Int64`, `Int32`,
        `boolean`), so every value is exact, a null is `pandas.NA`, and the types do not depend on the values."""
        import pandas

        nullable = {
            pa.int32(): pandas.Int32Dtype(),
            pa.int64(): pandas.Int64Dtype(),
            pa.bool_(): pandas.BooleanDtype(),
        }
        return self.to_arrow().to_pandas(types_mapper=nullable.get)

    def to_numpy(self) -> npt.NDArray[Any]:
        """One float matrix [keys, columns] in the order asked, NaN where a value is absent; an embedding float32[N]
        takes N columns, a bool is 0 or 1, a timestamp seconds since 1970.

        Raises:
            FormMissing: the answer's format has no matrix, a feature is not a number, or an integer is beyond ±2^53,
                which float64 cannot hold exactly. An `npy` answer is a matrix already: there the server has rounded.
        """
        raise self._lacks("to_numpy", "npy")

    def to_pydict(self) -> dict[str, list[Any]]:
        """The values as Python objects, a list a feature, None where absent."""
        raise self._lacks("to_pydict", "arrow")

    @property
    def statuses(self) -> dict[str, list[str]]:
        """View → the status of each key: PRESENT, NOT_FOUND, OUTSIDE_MAX_AGE or UNAVAILABLE."""
        raise self._lacks("statuses", "json")

    @property
    def event_timestamps(self) -> dict[str, list[str | None]]:
        """View → the event time of each key, as RFC 3339 has it."""
        raise self._lacks("event_timestamps", "json")

    def _lacks(self, what: str, form: str) -> FormMissing:
        return FormMissing(f"this answer has no {what}; look up with format={form!r}")


@dataclass(frozen=True)
class ArrowAnswer(Answer):
    """An answer that came as an Arrow stream; `body` is what the batch's columns lie in, if that is one piece."""

    batch: pa.RecordBatch
    body: bytes = b""

    def to_arrow(self) -> pa.RecordBatch:
        return self.batch

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


@dataclass(frozen=True)
class MatrixAnswer(Answer):
    """An answer that came as one matrix."""

    matrix: npt.NDArray[Any]

    def to_numpy(self) -> npt.NDArray[Any]:
        return self.matrix


@dataclass(frozen=True)
class JsonAnswer(Answer):
    """An answer that came as JSON."""

    document: Mapping[str, Any]

    def to_pydict(self) -> dict[str, list[Any]]:
        return dict(self.document["features"])

    @property
    def statuses(self) -> dict[str, list[str]]:
        return dict(self.document["status"])

    @property
    def event_timestamps(self) -> dict[str, list[str | None]]:
        return dict(self.document["event_timestamps"])


def _needs_double(kind: pa.DataType) -> bool:
    """Whether float32 would not hold all values of a type."""
    if pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    return not (pa.types.is_float32(kind) or pa.types.is_boolean(kind))


def _numbers(name: str, column: pa.Array) -> npt.NDArray[Any]:
    """A column as numbers [keys, width], NaN where absent; a view of its memory where that is so already."""
    kind, width = column.type, 1
    nulls = column.is_null().to_numpy(zero_copy_only=False) if column.null_count else None
    if pa.types.is_fixed_size_list(kind) and pa.types.is_floating(kind.value_type):
        width = kind.list_size
        # Behind a null there are values all the same; whatever they are.
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
        raise FormMissing(f"{name} is {kind}, which has no place in a matrix; take to_arrow")
    numbers: npt.NDArray[Any] = values.to_numpy(zero_copy_only=False).reshape(len(column), width)
    if nulls is not None:
        numbers = numbers.astype(np.float64 if _needs_double(kind) else np.float32)
        numbers[nulls] = np.nan
    return numbers


def _exact(name: str, integers: pa.Array) -> pa.Array:
    """Return integers as float64; raise FormMissing if one is not exact as float64."""
    try:
        return integers.cast(pa.float64())
    except pa.ArrowInvalid as error:
        raise FormMissing(
            f"{name} has an integer beyond ±2^53, which a matrix of float64 does not hold exactly ({error}); "
            f"take to_arrow, to_pandas or to_pydict"
        ) from None


def _view_of(columns: list[npt.NDArray[Any]], dtype: np.dtype[Any], body: bytes) -> npt.NDArray[Any] | None:
    """Columns as one matrix without a copy, where they lie in a body as the columns of one: each as far behind the one
    before. A server's answer is so if no value is null."""
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
