"""The answer to a lookup: columns, statuses and event times, in its own memory.

The gathered memory stays unchanged. It is converted on demand to single columns, Arrow, a NumPy matrix or Python
objects.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shoal.engine.base.errors import LookupInvalid, PandasMissing
from shoal.engine.format.schema import arrow_type, embedding_size
from shoal.engine.kernels import gathering
from shoal.engine.kernels.gathering import Status
from shoal.engine.lookup.result_column import Column, ViewRows
from shoal.engine.store.version import LookupPlan, Program

if TYPE_CHECKING:
    import pandas

_NAMED = 5
"""The number of features in the repr of an answer."""


@dataclass(frozen=True)
class HeapValues:
    """The values of a variable-length feature: their bytes, one after the other, and int32[keys + 1] offsets."""

    data: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int32]


@dataclass(frozen=True, repr=False)
class ViewColumns:
    """The gathered features of one view.

    The values of feature i are in `arena` from byte starts[i] on, or in `heap`. `valid` is uint8[features, keys], with
    1 for a value and 0 for a null. `nulls`, int64[features], counts the zeros in `valid`. `value_counts`,
    int64[STATUSES], is the number of values with each Status.
    """

    rows: ViewRows
    program: Program
    arena: npt.NDArray[np.uint8]
    starts: npt.NDArray[np.int64]
    valid: npt.NDArray[np.uint8]
    nulls: npt.NDArray[np.int64]
    value_counts: npt.NDArray[np.int64]
    heap: Mapping[int, HeapValues]

    @property
    def nbytes(self) -> int:
        """The size of the values in bytes."""
        return self.arena.nbytes + self.valid.nbytes + sum(values.data.nbytes for values in self.heap.values())

    def __repr__(self) -> str:
        features, keys = self.valid.shape
        return f"<ViewColumns of {self.rows.view}: {keys} keys × {features} features>"

    @cached_property
    def columns(self) -> list[Column]:
        """One column per feature of the view."""
        sizes = self.program.outputs[:, gathering.WIDTH] * self.valid.shape[1]
        starts = self.starts.tolist()
        ends = (self.starts + sizes).tolist()
        nulls = self.nulls.tolist()
        columns = []
        for index, feature in enumerate(self.program.features):
            reference = f"{self.rows.view}:{feature.name}"
            heap = self.heap.get(index)
            memory = heap.data if heap else self.arena[starts[index] : ends[index]]
            offsets = heap.offsets if heap else None
            columns.append(Column(reference, feature, self.rows, memory, self.valid[index], nulls[index], offsets))
        return columns


@dataclass(frozen=True, repr=False)
class MatrixResult:
    """The answer to a lookup of numbers.

    `matrix` is [keys, columns] in the requested order, with NaN for an absent value. All values are from the store's
    version `version`. `applied` are the positions of the views in their logs (see `StoreVersion.applied`).
    `value_counts` has, for each view, the number of values with each Status. `column_names` is the same as in
    `shoal.engine.store.version.MatrixPlan`.
    """

    version: int
    applied: str
    keys: int
    matrix: npt.NDArray[np.floating]
    views: Mapping[str, ViewRows]
    value_counts: Mapping[str, npt.NDArray[np.int64]]
    column_names: str

    @property
    def nbytes(self) -> int:
        """The size of the values in bytes."""
        return self.matrix.nbytes

    def __repr__(self) -> str:
        keys, columns = self.matrix.shape
        return f"<MatrixResult of version {self.version}: {keys} keys × {columns} columns of {self.matrix.dtype}>"

    @property
    def partial(self) -> list[str]:
        """The views with rows that did not arrive in time."""
        return partial_views(self.value_counts)


def partial_views(value_counts: Mapping[str, npt.NDArray[np.int64]]) -> list[str]:
    """Return the views with values that are UNAVAILABLE."""
    return [view for view, counts in value_counts.items() if counts[Status.UNAVAILABLE]]


@dataclass(frozen=True, repr=False)
class LookupResult:
    """The answer to a lookup: `keys` rows, all read from the store's version `version`.

    `parts` has the requested views, in the order of `plan`.
    """

    version: int
    keys: int
    parts: Sequence[ViewColumns]
    plan: LookupPlan

    @property
    def nbytes(self) -> int:
        """The size of the values in bytes."""
        return sum(part.nbytes for part in self.parts)

    def __repr__(self) -> str:
        references = self.plan.references
        more = f", … ({len(references)} in all)" if len(references) > _NAMED else ""
        named = ", ".join(references[:_NAMED]) + more
        return f"<LookupResult of version {self.version}: {self.keys} keys × {named}>"

    @cached_property
    def columns(self) -> list[Column]:
        """One column per feature, in the requested order."""
        return [self.parts[part].columns[column] for part, column in self.plan.order]

    @property
    def applied(self) -> str:
        """The positions of the views in their logs: see `StoreVersion.applied`."""
        return self.plan.applied

    @property
    def value_counts(self) -> dict[str, npt.NDArray[np.int64]]:
        """The number of values with each Status, by view."""
        return {part.rows.view: part.value_counts for part in self.parts}

    @property
    def partial(self) -> list[str]:
        """The views with rows that did not arrive in time."""
        return partial_views(self.value_counts)

    @property
    def views(self) -> dict[str, ViewRows]:
        """The statuses and event times of the rows, by view."""
        return {part.rows.view: part.rows for part in self.parts}

    def __getitem__(self, reference: str) -> Column:
        """Return the column of the feature `view:feature`; raise KeyError if the request did not name this feature."""
        for column in self.columns:
            if column.reference == reference:
                return column
        raise KeyError(reference)

    def to_arrow(self) -> pa.RecordBatch:
        """Return a record batch with one column per feature, named `view:feature`, with nulls. The schema's metadata
        contains the version."""
        schema = pa.schema(
            [pa.field(column.reference, arrow_type(column.feature.type)) for column in self.columns],
            metadata={"shoal.version": str(self.version)},
        )
        return pa.RecordBatch.from_arrays([column.to_arrow() for column in self.columns], schema=schema)

    def to_numpy(self, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
        """Return one matrix [keys, features] in the requested order, with NaN for an absent value. An embedding
        float32[N] takes N columns, a bool becomes 0 or 1, a timestamp becomes seconds since 1970.

        Raises:
            LookupInvalid: a feature is a string, bytes or a variable list, or `dtype` is not a float type.
        """
        if not np.issubdtype(dtype, np.floating):
            raise LookupInvalid(f"a matrix of {np.dtype(dtype)} has no NaN for absent values; ask for a float type")
        widths = [embedding_size(column.feature.type) or 1 for column in self.columns]
        matrix = np.empty((self.keys, sum(widths)), dtype)
        position = 0
        for column, width in zip(self.columns, widths, strict=True):
            target = matrix[:, position : position + width]
            values = column.values.reshape(self.keys, width)
            if column.feature.type == "timestamp":
                target[:] = values.view(np.int64)
                target /= 1e6
            else:
                target[:] = values
            if column.nulls:
                target[column.valid == 0] = np.nan
            position += width
        return matrix

    def to_pandas(self) -> "pandas.DataFrame":
        """Return a DataFrame with one row per key, in request order, and one column per feature, named `view:feature`.

        Values stay exact: integers and bools always have the types Int32, Int64 and boolean, with `<NA>` for null. A
        null float is NaN, a null timestamp NaT, any other null None. A column's `status` distinguishes null from a
        stored NaN.

        Raises:
            PandasMissing: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise PandasMissing("to_pandas needs pandas, which is not installed: pip install pandas") from None
        nullable = {
            pa.int32(): pandas.Int32Dtype(),
            pa.int64(): pandas.Int64Dtype(),
            pa.bool_(): pandas.BooleanDtype(),
        }
        return self.to_arrow().to_pandas(types_mapper=nullable.get)

    def to_pydict(self) -> dict[str, list[Any]]:
        """Return the values as Python objects: one list per feature, with None for an absent value."""
        return {column.reference: column.to_pylist() for column in self.columns}
