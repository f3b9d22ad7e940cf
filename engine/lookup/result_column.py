"""One feature of an answer for all keys: the gathered values, and their conversion to Arrow and Python."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shoal.engine.base.errors import LOAD_AGAIN, LookupInvalid, ViewDamaged
from shoal.engine.format.schema import Feature, arrow_type, embedding_size
from shoal.engine.kernels import gathering
from shoal.engine.kernels.gathering import Status
from shoal.engine.kernels.memory import address_of

_NUMPY_TYPES: dict[str, npt.DTypeLike] = {
    "bool": np.bool_,
    "int32": np.int32,
    "int64": np.int64,
    "float32": np.float32,
    "float64": np.float64,
    "timestamp": np.dtype("M8[us]"),
}


@dataclass(frozen=True, repr=False)
class ViewRows:
    """The rows that were found in one view. `status`, uint8[keys], has the Status of each key. `event_time`,
    int64[keys], has the event time of each key in microseconds since 1970, or NaT (the minimum int64) for a key without
    a row."""

    view: str
    status: npt.NDArray[np.uint8]
    event_time: npt.NDArray[np.int64]

    def __repr__(self) -> str:
        return f"<ViewRows of {self.view}: {self.status.size} keys>"

    @property
    def event_timestamps(self) -> npt.NDArray[np.datetime64]:
        """The event times as datetime64[us]."""
        return self.event_time.view("M8[us]")


class Column:
    """One feature for all keys.

    A fixed-width feature has `values`: [keys], or float32[keys, N] for an embedding. A null is NaN in a float feature
    and zero in any other feature. `valid` is uint8[keys], with 1 for a value and 0 for a null. `nulls` counts the zeros
    in `valid`.
    """

    def __init__(
        self,
        reference: str,
        feature: Feature,
        rows: ViewRows,
        memory: npt.NDArray[np.uint8],
        valid: npt.NDArray[np.uint8],
        nulls: int,
        offsets: npt.NDArray[np.int32] | None = None,
    ) -> None:
        self.reference = reference
        self.feature = feature
        self.rows = rows
        self.valid = valid
        self.nulls = nulls
        self._memory = memory
        self._offsets = offsets

    def __repr__(self) -> str:
        return f"<Column {self.reference}: {self.valid.size} keys of {self.feature.type}, {self.nulls} null>"

    @property
    def values(self) -> npt.NDArray[Any]:
        """The values of a fixed-width feature.

        Raises:
            LookupInvalid: the feature is a string, bytes or a variable list.
        """
        dtype = _NUMPY_TYPES.get(self.feature.type)
        if dtype is not None:
            return self._memory.view(dtype)
        size = embedding_size(self.feature.type)
        if size is None:
            raise LookupInvalid(f"{self.reference} is {self.feature.type}, not of fixed width; ask for Arrow or JSON")
        return self._memory.view(np.float32).reshape(-1, size)

    @property
    def status(self) -> npt.NDArray[np.uint8]:
        """The Status of each value, uint8[keys]: the row's Status, or NULL_VALUE for a null in a PRESENT row."""
        if not self.nulls:
            return self.rows.status
        null_in_row = (self.valid == 0) & (self.rows.status == Status.PRESENT)
        return np.where(null_in_row, np.uint8(Status.NULL_VALUE), self.rows.status)

    def slice(self, start: int, stop: int) -> "Column":
        """Return the column of the keys from `start` up to `stop` (excluded). The returned column uses the same
        memory."""
        valid = self.valid[start:stop]
        memory = self._memory
        offsets = self._offsets
        if offsets is not None:
            offsets = offsets[start : stop + 1]
        else:
            width = memory.size // max(1, self.valid.size)
            memory = memory[start * width : stop * width]
        rows = ViewRows(self.rows.view, self.rows.status[start:stop], self.rows.event_time[start:stop])
        nulls = int(valid.size - np.count_nonzero(valid))
        return Column(self.reference, self.feature, rows, memory, valid, nulls, offsets)

    def to_arrow(self) -> pa.Array:
        """Return the column as an Arrow array of `arrow_type(feature.type)`, without copying fixed-width values."""
        keys = self.valid.size
        target = arrow_type(self.feature.type)
        validity = pa.py_buffer(np.packbits(self.valid, bitorder="little")) if self.nulls else None
        if self._offsets is not None:
            return self._heap_to_arrow(target, validity, self._offsets)
        if embedding_size(self.feature.type):
            items = pa.Array.from_buffers(pa.float32(), self._memory.size // 4, [None, pa.py_buffer(self._memory)])
            return pa.FixedSizeListArray.from_arrays(items, type=target, mask=self._null_mask())
        data = np.packbits(self._memory, bitorder="little") if self.feature.type == "bool" else self._memory
        return pa.Array.from_buffers(target, keys, [validity, pa.py_buffer(data)], self.nulls)

    def to_pylist(self, *, shortest: bool = False) -> list[Any]:
        """Return the values as Python objects, with None for an absent value.

        Args:
            shortest: return a float32 as the float with the fewest digits that rounds to the same float32, not as its
                exact value.

        Raises:
            ViewDamaged: a stored text is not UTF-8, although every loaded text is.
        """
        try:
            values: list[Any] = self.to_arrow().to_pylist()
        except UnicodeDecodeError as error:
            raise ViewDamaged(f"{self.reference} holds a text that is not UTF-8 ({error}); {LOAD_AGAIN}") from None
        return list(map(_shortest, values)) if shortest and "float32" in self.feature.type else values

    def _null_mask(self) -> pa.Array | None:
        return pa.array(self.valid == 0) if self.nulls else None

    def _heap_to_arrow(
        self, target: pa.DataType, validity: pa.Buffer | None, offsets: npt.NDArray[np.int32]
    ) -> pa.Array:
        keys = self.valid.size
        data = pa.py_buffer(self._memory)
        if not pa.types.is_list(target):
            return pa.Array.from_buffers(target, keys, [validity, pa.py_buffer(offsets), data], self.nulls)
        if pa.types.is_string(target.value_type):
            list_offsets = np.empty(keys + 1, np.int32)
            size = gathering.string_list_sizes(address_of(self._memory), offsets, list_offsets)
            string_offsets = np.empty(int(list_offsets[-1]) + 1, np.int32)
            strings = np.empty(size, np.uint8)
            gathering.copy_string_lists(
                address_of(self._memory), offsets, list_offsets, string_offsets, address_of(strings)
            )
            buffers = [None, pa.py_buffer(string_offsets), pa.py_buffer(strings)]
            items = pa.Array.from_buffers(pa.string(), string_offsets.size - 1, buffers)
        else:
            width = target.value_type.bit_width // 8
            list_offsets = offsets // np.int32(width)
            items = pa.Array.from_buffers(target.value_type, int(list_offsets[-1]), [None, data])
        buffers = [validity, pa.py_buffer(list_offsets)]
        return pa.Array.from_buffers(target, keys, buffers, self.nulls, children=[items])


def _shortest(value: Any) -> Any:
    if isinstance(value, list):
        return [_shortest(item) for item in value]
    return None if value is None else float(str(np.float32(value)))
