"""Resolve a group of pushes to one row per key, by their event times and what the store has.

The rows of a key make a chain: one push behind the other in the order of arrival, and within a push in the order of
event times (of rows of the same event time the one given later comes later). A row is superseded if it is older than
what the store, or an earlier push, has of its key; it changes nothing. The others change the key one after the other: a
tombstone takes all features away, a row sets those that it gives.

All keys are resolved together, feature by feature. Nothing here is stored: `loaders.push` does that.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from engine.errors import PushInvalid
from engine.kernels import gathering
from engine.kernels.compiling import kernel
from engine.lookup import read_columns
from engine.manifest import TOMBSTONE
from engine.schema import Feature, ViewSchema
from engine.version import ViewVersion
from loaders.apply import event_times, key_hashes, stored_event_times
from loaders.arrow_rows import published_schema

_Int64s = npt.NDArray[np.int64]
_Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Outcome:
    """What a group of pushes leaves: one row for each key that it changes, with all columns of a published delta, in
    the order of the keys' hashes, None if it changes nothing; and for each push how many of its rows are superseded."""

    rows: pa.RecordBatch | None
    superseded: list[int]


def resolved(version: ViewVersion, parts: Sequence[tuple[int, pa.RecordBatch]], pushes: int) -> Outcome:
    """Resolve a group of pushes against a view.

    Args:
        parts: the batches of all pushes, in order, as `engine.pushed_rows` makes them, each with its push's number; no
            batch is empty.
        pushes: how many pushes there are.

    Raises:
        PushInvalid: rows do not fit the view's schema, which changed since they were made.
    """
    tables = _tables(version.record.view_schema, parts)
    keys = np.concatenate([key_hashes(table.rows) for table in tables], axis=1)
    event_time = np.concatenate([event_times(table.rows) for table in tables])
    push = np.concatenate([table.push for table in tables])
    order = _by_key(keys, event_time, push, np.concatenate([table.place for table in tables]))
    starts = _starts(_columns_of(keys, order))
    stored = stored_event_times(version, _columns_of(keys, order[starts[:-1]]), of_pushes=True)
    late = np.empty(event_time.size, np.bool_)
    mark_superseded(order, starts, push, event_time, stored, late)
    superseded = np.bincount(push[late], minlength=pushes).tolist()
    # Each is at least as new as every row of an earlier push: they are in the order in which they apply.
    taken = order[~late[order]]
    if not taken.size:
        return Outcome(None, superseded)
    return Outcome(_completed(_Chains(tables, keys, taken, _starts(_columns_of(keys, taken))), version), superseded)


def _columns_of(keys: _Int64s, numbers: _Int64s) -> _Int64s:
    """Return the columns of a matrix with these numbers, each row of it contiguous: indexing would lay them out by
    column, and kernels would be compiled a second time for that layout."""
    return np.take(keys, numbers, axis=1)


def _by_key(keys: _Int64s, event_time: _Int64s, push: _Int64s, place: _Int64s) -> _Int64s:
    """The order of rows by key, then push, then event time, then their place among all rows."""
    order = np.argsort(keys[0])
    first = keys[0][order]
    if (first[1:] != first[:-1]).all():
        return order  # Most groups have a row a key, and there is nothing more to sort.
    return np.lexsort((place, event_time, push, keys[1], keys[0]))


@dataclass(frozen=True)
class _Table:
    """The rows of all pushes that give the same features, or are tombstones, which give none."""

    rows: pa.RecordBatch
    push: _Int64s
    place: _Int64s

    @cached_property
    def is_dead(self) -> bool:
        return bool(self.rows.column(TOMBSTONE)[0].as_py())


def _tables(schema: ViewSchema, parts: Sequence[tuple[int, pa.RecordBatch]]) -> list[_Table]:
    alike: dict[tuple[str, ...], list[int]] = {}
    for number, (_, batch) in enumerate(parts):
        alike.setdefault(tuple(batch.schema.names), []).append(number)
    sizes = np.array([batch.num_rows for _, batch in parts], np.int64)
    begins = np.cumsum(sizes) - sizes
    tables = []
    for names, numbers in alike.items():
        fields = _fields(schema, names)
        batches = [_fitted(schema, fields, parts[number][1]) for number in numbers]
        rows = batches[0] if len(batches) == 1 else pa.Table.from_batches(batches).combine_chunks().to_batches()[0]
        push = np.repeat([parts[number][0] for number in numbers], sizes[numbers])
        place = np.concatenate([np.arange(begins[number], begins[number] + sizes[number]) for number in numbers])
        tables.append(_Table(rows, push, place))
    return tables


def _fields(schema: ViewSchema, names: Sequence[str]) -> pa.Schema:
    """The columns of these names, in the types in which they are encoded; raises PushInvalid."""
    wanted, features = published_schema(schema, delta=True), {feature.name for feature in schema.features}
    unknown = set(names) - set(wanted.names)
    if unknown:
        raise PushInvalid(f"view {schema.name!r} has no feature {min(unknown)!r} any more; push the rows without it")
    lacking = [name for name in wanted.names if name not in names and name not in features]
    if lacking:
        raise PushInvalid(f"rows for view {schema.name!r} lack {lacking[0]!r}; push them again")
    return pa.schema([field for field in wanted if field.name in names])


def _fitted(schema: ViewSchema, fields: pa.Schema, rows: pa.RecordBatch) -> pa.RecordBatch:
    """Rows with their columns in these types; raises PushInvalid if they have others."""
    if rows.schema.equals(fields):
        return rows
    columns = []
    for field in fields:
        column = rows.column(field.name)
        try:
            columns.append(column.cast(field.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise PushInvalid(
                f"feature {field.name!r} of view {schema.name!r} is {field.type} now, {column.type} was pushed; push "
                f"the rows again"
            ) from None
    return pa.RecordBatch.from_arrays(columns, schema=fields)


def _starts(keys: _Int64s) -> _Int64s:
    """Where the rows of each key begin, of rows in the order of their keys (int64[2, rows], rows > 0); then `rows`."""
    is_first = np.append(True, (keys[:, 1:] != keys[:, :-1]).any(axis=0))
    return np.append(np.flatnonzero(is_first), keys.shape[1])


@kernel
def mark_superseded(order: Any, starts: Any, push: Any, event_time: Any, stored: Any, late: Any) -> None:
    """Mark the rows that are older than what the store, or an earlier push, has of their key.

    Args:
        order: int64[rows], the rows by key, then push, then event time.
        starts: int64[keys + 1], where in `order` each key begins.
        push, event_time: int64[rows], of each row.
        stored: int64[keys], the event time of what the store has of each key.
        late: bool[rows], becomes whether each row is superseded.
    """
    for key in range(stored.size):
        before = newest = stored[key]
        for position in range(starts[key], starts[key + 1]):
            row = order[position]
            if position > starts[key] and push[row] != push[order[position - 1]]:
                before = newest
            late[row] = event_time[row] < before
            newest = max(newest, event_time[row])


class _Chains:
    """The rows that are not superseded. A row's number counts through all tables.

    Args:
        keys: int64[2, all rows], the hashes of the key of each row.
        taken: int64[rows], their numbers, by key and then in the order in which they apply; not empty.
        starts: int64[keys + 1], where in `taken` each key begins.
    """

    def __init__(self, tables: Sequence[_Table], keys: _Int64s, taken: _Int64s, starts: _Int64s) -> None:
        self.tables = tables
        self.keys = _columns_of(keys, taken[starts[:-1]])
        """int64[2, keys], the hashes of the keys."""
        self._taken = taken
        self._starts = starts
        self._begins = np.cumsum([0, *(table.rows.num_rows for table in tables)], dtype=np.int64)
        self.last = taken[starts[1:] - 1]
        """int64[keys], the row that each chain ends with."""

    def last_in(self, tables: tuple[bool, ...]) -> _Int64s:
        """int64[keys], the position of each chain's last row from some of the tables; -1 if it has none."""
        is_from: _Bools = np.array(tables)[np.searchsorted(self._begins, self._taken, side="right") - 1]
        positions = np.where(is_from, np.arange(self._taken.size), -1)
        last: _Int64s = np.maximum.reduceat(positions, self._starts[:-1])
        return last

    def rows_at(self, positions: _Int64s) -> _Int64s:
        """The numbers of the rows at positions; -1 where that is -1."""
        return np.where(positions >= 0, self._taken[positions], -1)

    def values(self, field: pa.Field, rows: _Int64s, stored: pa.Array | None, is_stored: _Bools) -> pa.Array:
        """A column: of each key the value of a row, or where the row is -1, the stored value or null.

        Args:
            rows: int64[keys], numbers of rows of tables that have the column.
            stored: values of all keys; None if none is stored.
        """
        columns, behind, begins = [], 0, np.zeros(len(self.tables), np.int64)
        for number, table in enumerate(self.tables):
            if field.name in table.rows.schema.names:
                columns.append(table.rows.column(field.name))
                begins[number] = behind
                behind += table.rows.num_rows
        table_of = np.searchsorted(self._begins, rows, side="right") - 1
        places = rows - self._begins[table_of] + begins[table_of]
        if stored is not None:
            columns.append(stored.cast(field.type))
            places = np.where(is_stored, behind + np.arange(rows.size), places)
        is_null = (rows < 0) & ~is_stored
        if not columns:
            return pa.nulls(rows.size, field.type)
        return pa.concat_arrays(columns).take(pa.array(places, mask=is_null))


def _completed(chains: _Chains, version: ViewVersion) -> pa.RecordBatch:
    """The row that each chain leaves, with all columns of the view."""
    if len(chains.tables) == 1:
        return _completed_alike(chains, version)
    schema, tables = version.record.view_schema, chains.tables
    features = {feature.name: feature for feature in schema.features}
    last_tombstone = chains.last_in(tuple(table.is_dead for table in tables))
    holders = {name: tuple(name in table.rows.schema.names for table in tables) for name in features}
    # Most features are given by the same tables as another: what these leave is asked once.
    last = {holding: chains.last_in(holding) for holding in set(holders.values())}
    is_stored = {holding: (last[holding] < 0) & (last_tombstone < 0) for holding in last}
    rows = {holding: chains.rows_at(np.where(last[holding] > last_tombstone, last[holding], -1)) for holding in last}
    wanting = [feature for name, feature in features.items() if is_stored[holders[name]].any()]
    stored = _as_stored(version, wanting, chains.keys) if wanting else {}
    none_stored = np.zeros(chains.last.size, np.bool_)
    columns = []
    for field in published_schema(schema, delta=True):
        if field.name in features:
            holding = holders[field.name]
            columns.append(chains.values(field, rows[holding], stored.get(field.name), is_stored[holding]))
        else:
            columns.append(chains.values(field, chains.last, None, none_stored))
    return pa.RecordBatch.from_arrays(columns, schema=published_schema(schema, delta=True))


def _completed_alike(chains: _Chains, version: ViewVersion) -> pa.RecordBatch:
    """The same where all rows give the same features: the last row of a chain is all that it leaves."""
    (table,) = chains.tables
    schema, rows = version.record.view_schema, table.rows.take(pa.array(chains.last))
    lacking = [feature for feature in schema.features if feature.name not in rows.schema.names]
    stored = _as_stored(version, lacking, key_hashes(rows)) if lacking and not table.is_dead else {}
    columns = []
    for field in published_schema(schema, delta=True):
        if field.name in rows.schema.names:
            columns.append(rows.column(field.name))
        else:
            columns.append(stored[field.name].cast(field.type) if stored else pa.nulls(rows.num_rows, field.type))
    return pa.RecordBatch.from_arrays(columns, schema=published_schema(schema, delta=True))


def _as_stored(version: ViewVersion, features: Sequence[Feature], keys: _Int64s) -> dict[str, pa.Array]:
    names = tuple(feature.name for feature in features)
    found = read_columns(version, names, keys, oldest=gathering.NO_EVENT_TIME, stale="serve")
    return {name: column.to_arrow() for name, column in zip(names, found.columns, strict=True)}
