"""The entities of a request, as Arrow arrays of the types that the views' join keys have."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from engine.errors import LookupInvalid
from engine.schema import JoinKey, arrow_type
from engine.version import ViewVersion

Entities = Mapping[str, Any]
"""Join key → a scalar, repeated for every row, or a list, NumPy array or Arrow array of values."""


class KeyColumns:
    """The entities of a request, each made an Arrow array of the type that a view wants when it wants it."""

    def __init__(self, entities: Entities) -> None:
        self._entities = entities
        self.count = 1
        first_list = None
        for name, values in entities.items():
            if _is_scalar(values):
                continue
            length = _length(name, values)
            if first_list is not None and length != self.count:
                raise LookupInvalid(
                    f"entity {name!r} has {length} values, but {first_list!r} has {self.count}; lists must be of one "
                    f"length (a scalar is repeated)"
                )
            first_list, self.count = name, length
        self._made: dict[JoinKey, pa.Array] = {}

    def of(self, view: ViewVersion) -> list[pa.Array]:
        """A view's join keys in order; of one row if all are scalars, else of `count` rows."""
        join_keys = view.record.view_schema.join_keys
        scalar = all(_is_scalar(self._entities.get(key.name)) for key in join_keys)
        columns = [self._column(key, view.record.view_schema.name) for key in join_keys]
        if scalar or all(len(column) == self.count for column in columns):
            return columns
        return [column if len(column) == self.count else pa.repeat(column[0], self.count) for column in columns]

    def _column(self, key: JoinKey, view: str) -> pa.Array:
        if key not in self._made:
            if key.name not in self._entities:
                given = ", ".join(self._entities) or "none"
                raise LookupInvalid(
                    f"view {view!r} is looked up by {key.name!r}, which is not among the entities ({given})"
                )
            values = self._entities[key.name]
            self._made[key] = _key_array(key, [values] if _is_scalar(values) else values)
        return self._made[key]


def _is_scalar(values: Any) -> bool:
    return values is None or isinstance(values, str | int | float | bytes | np.generic)


def _length(name: str, values: Any) -> int:
    try:
        return len(values)
    except TypeError:
        raise LookupInvalid(
            f"entity {name!r} is of type {type(values).__name__}; give a scalar, a list, or a NumPy or Arrow array"
        ) from None


def _key_array(key: JoinKey, values: Any) -> pa.Array:
    """The values of a join key as one contiguous Arrow array without nulls."""
    wanted = arrow_type(key.type)
    try:
        if isinstance(values, pa.ChunkedArray):
            values = values.combine_chunks()
        # The type is found first, since a conversion would take the float 1.5 for the key 1.
        column = values if isinstance(values, pa.Array) else pa.array(values)
        if column.type != wanted:
            if len(column) and not _fits(column.type, wanted):
                raise LookupInvalid(
                    f"entity {key.name!r} must be {key.type}, but holds {column.type}, such as {column[0].as_py()!r}"
                )
            column = column.cast(wanted)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError, UnicodeError) as error:
        raise LookupInvalid(f"entity {key.name!r} must be {key.type}: {error}") from None
    if column.null_count:
        position = column.is_null().to_pylist().index(True)
        raise LookupInvalid(f"entity {key.name!r} is null in row {position}; leave such rows out of the request")
    return column


def _fits(given: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether values of a type can be keys of another; nulls can, and are refused by themselves."""
    if pa.types.is_dictionary(given):
        given = given.value_type
    if pa.types.is_null(given):
        return True
    if pa.types.is_int64(wanted):
        return bool(pa.types.is_integer(given))
    return bool(pa.types.is_string(given) or pa.types.is_large_string(given) or pa.types.is_string_view(given))
