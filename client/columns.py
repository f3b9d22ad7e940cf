"""Check, count and convert a caller's columns, for lookups and pushes."""

from collections.abc import Mapping, Set
from typing import Any

from shoal.client.errors import RequestInvalid
from shoal.client.quoting import abbreviated
from shoal.client.wire import Columns


def check_columns(member: str, columns: Any, *, scalars: bool) -> None:
    """Raise RequestInvalid if a caller's columns are not a mapping of names to lists or arrays of one length.

    Args:
        member: the name of the argument, for the message.
        scalars: whether a column may be one value for all rows.
    """
    if not isinstance(columns, Mapping):
        raise RequestInvalid(
            f"{member} is {abbreviated(columns)}; give a mapping of names to columns, such as "
            f"{{'doc_id': ['d1', 'd2']}}"
        )
    if not columns:
        raise RequestInvalid(f"{member} has no columns; give the join keys at least")
    for name, values in columns.items():
        if not isinstance(name, str):
            raise RequestInvalid(f"{member} has the column name {abbreviated(name)}; a column name must be a str")
        if not (isinstance(values, list) or _is_column(values) or (scalars and is_scalar(values))):
            raise RequestInvalid(
                f"{member}[{name!r}] is {abbreviated(values)}; give a list, NumPy array or Arrow array"
            )
    count_rows(columns)


def _is_column(values: Any) -> bool:
    return not is_scalar(values) and not isinstance(values, Mapping | Set) and getattr(values, "ndim", 1) > 0


def is_scalar(values: Any) -> bool:
    """Return whether an entity is one value for all rows."""
    return isinstance(values, str | bytes) or not hasattr(values, "__len__")


def count_rows(columns: Columns) -> int:
    """Return how many rows the columns have, 1 if all are scalars; raise RequestInvalid if their lengths differ."""
    lengths = {name: len(values) for name, values in columns.items() if not is_scalar(values)}
    if len(set(lengths.values())) > 1:
        details = ", ".join(f"{name!r} has {length} values" for name, length in lengths.items())
        raise RequestInvalid(f"{details}; lists must be of one length (a scalar is repeated)")
    return next(iter(lengths.values()), 1)


def as_list(values: Any) -> list[Any]:
    """Return a column's values as Python objects."""
    if isinstance(values, list):
        return values
    for method in ("to_pylist", "tolist"):
        if hasattr(values, method):
            return list(getattr(values, method)())
    return list(values)
