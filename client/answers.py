"""Answers to lookups, in forms for a ranker, and answers to pushes.

If possible, `to_arrow` and `to_numpy` return views of the memory of the response, without a copy.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy.typing as npt

from shoal.client.errors import FormMissing

if TYPE_CHECKING:
    import pyarrow as pa


class Position(NamedTuple):
    """The position of a view in its log: the seq of the last applied entry, and the beginning of the entry's id."""

    seq: int
    entry: str

    def __str__(self) -> str:
        return f"{self.seq}@{self.entry}"


@dataclass(frozen=True)
class Pushed:
    """The result of a push: the number of its `rows`, the number of rows that newer rows `superseded`, and, by address,
    the first version in which each store shows the push."""

    rows: int
    superseded: int
    versions: Mapping[str, int]


@dataclass(frozen=True)
class Answer:
    """The answer to a lookup.

    `version` is the version of the store; None if several shards were asked. `applied` is the position of each view in
    its log. `partial` names the views with missing rows: their rows did not arrive from their table in time."""

    version: int | None
    applied: Mapping[str, Position]
    partial: tuple[str, ...]

    def to_arrow(self) -> "pa.RecordBatch":
        """Return one column per feature, named `view:feature`, with nulls as nulls."""
        raise self._lacks("to_arrow", "arrow")

    def to_pandas(self) -> Any:
        """Return a DataFrame; needs pandas. Integers and bools have pandas' nullable types (`Int64`, `Int32`,
        `boolean`), so every value is exact, a null is `pandas.NA`, and the types do not depend on the values."""
        raise self._lacks("to_pandas", "arrow")

    def to_numpy(self) -> npt.NDArray[Any]:
        """Return one float matrix [keys, columns] in the requested order. An absent value is NaN. An embedding
        float32[N] takes N columns, a bool is 0 or 1, a timestamp is the number of seconds since 1970.

        Raises:
            FormMissing: the answer's format has no matrix, a feature is not a number, or an integer is beyond ±2^53,
                which float64 cannot hold exactly. In the `npy` format the server makes the matrix, and rounds such
                integers.
        """
        raise self._lacks("to_numpy", "npy")

    def to_pydict(self) -> dict[str, list[Any]]:
        """Return the values as Python objects, one list per feature, with None for an absent value."""
        raise self._lacks("to_pydict", "arrow")

    @property
    def statuses(self) -> dict[str, list[str]]:
        """View → the status of each key: PRESENT, NOT_FOUND, OUTSIDE_MAX_AGE or UNAVAILABLE."""
        raise self._lacks("statuses", "json")

    @property
    def event_timestamps(self) -> dict[str, list[str | None]]:
        """View → the event time of each key, in RFC 3339."""
        raise self._lacks("event_timestamps", "json")

    def _lacks(self, what: str, form: str) -> FormMissing:
        return FormMissing(f"this answer has no {what}; look up with format={form!r}")


@dataclass(frozen=True)
class MatrixAnswer(Answer):
    """An answer in the form of one matrix."""

    matrix: npt.NDArray[Any]

    def to_numpy(self) -> npt.NDArray[Any]:
        return self.matrix


@dataclass(frozen=True)
class JsonAnswer(Answer):
    """An answer in the form of JSON."""

    document: Mapping[str, Any]

    def to_pydict(self) -> dict[str, list[Any]]:
        return dict(self.document["features"])

    @property
    def statuses(self) -> dict[str, list[str]]:
        return dict(self.document["status"])

    @property
    def event_timestamps(self) -> dict[str, list[str | None]]:
        return dict(self.document["event_timestamps"])
