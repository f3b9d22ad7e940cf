"""Resolve a group of pushes to one row per key, from the event times and the stored rows.

The rows of a key form a chain. Pushes follow each other in the order of arrival. The rows of one push follow each other
in the order of event times; if two rows have the same event time, the row that was given later comes later. A row is
superseded if it is older than the stored row of its key, or than a row of an earlier push. A superseded row changes
nothing. The other rows change the key one after the other: a tombstone removes all features, and a row sets the
features that it gives.

All keys are resolved together, feature by feature. This module stores nothing: `shoal.loaders.push.push` does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shoal.engine.base.errors import PushInvalid
from shoal.engine.format.schema import Feature, ViewSchema
from shoal.engine.kernels import gathering
from shoal.engine.kernels.compiling import kernel
from shoal.engine.lookup.columns import read_columns
from shoal.engine.lookup.key_columns import take_keys
from shoal.engine.root.manifest import TOMBSTONE
from shoal.engine.store.version import ViewVersion
from shoal.loaders.apply.entries import event_times, published_key_hashes, stored_event_times
from shoal.loaders.segments.arrow_rows import published_schema

_Int64s = npt.NDArray[np.int64]
_Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Outcome:
    """The result of a group of pushes.

    `rows` has one row per changed key, with all columns of a published delta, in the order of the keys' hashes; it is
    None if no key changes. `superseded` is the number of superseded rows of each push.
    """

    rows: pa.RecordBatch | None
    superseded: list[int]


def resolved(version: ViewVersion, parts: Sequence[tuple[int, pa.RecordBatch]], pushes: int) -> Outcome:
    """Resolve a group of pushes against a view.

    Args:
        parts: the batches of all pushes, in order, as `shoal.engine.push.pushed_rows` makes them, each with the number
            of its push; no batch is empty.
        pushes: the number of pushes.

    Raises:
        PushInvalid: rows do not fit the view's schema, because it changed after the rows were made.
    """
    tables = _tables(version.record.view_schema, parts)
    keys = np.concatenate([published_key_hashes(table.rows) for table in tables], axis=1)
    event_time = np.concatenate([event_times(table.rows) for table in tables])
    push = np.concatenate([table.push for table in tables])
    order = _by_key(keys, event_time, push, np.concatenate([table.place for table in tables]))
    starts = _starts(take_keys(keys, order))
    stored = stored_event_times(version, take_keys(keys, order[starts[:-1]]), of_pushes=True)
    late = np.empty(event_time.size, np.bool_)
    mark_superseded(order, starts, push, event_time, stored, late)
    superseded = np.bincount(push[late], minlength=pushes).tolist()
    # These rows are in the order in which they apply, because each row is at least as new as every row of an earlier
    # push.
    taken = order[~late[order]]
    if not taken.size:
        return Outcome(None, superseded)
    return Outcome(_completed(_Chains(tables, keys, taken, _starts(take_keys(keys, taken))), version), superseded)


def _by_key(keys: _Int64s, event_time: _Int64s, push: _Int64s, place: _Int64s) -> _Int64s:
    """Return the numbers of the rows in the order of key, then push, then event time, then place (position among all
    rows)."""
    order = np.argsort(keys[0])
    first = keys[0][order]
    if (first[1:] != first[:-1]).all():
        return order  # Most groups have one row per key, so nothing more needs sorting.
    return np.lexsort((place, event_time, push, keys[1], keys[0]))


@dataclass(frozen=True)
class _Table:
    """The rows of all pushes with the same set of features; tombstones have no features."""

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
    """Return the columns of these names in their encoded types; raise PushInvalid if one is unknown or missing."""
    wanted = published_schema(schema, delta=True)
    features = {feature.name for feature in schema.features}
    unknown = set(names) - set(wanted.names)
    if unknown:
        raise PushInvalid(f"view {schema.name!r} has no feature {min(unknown)!r} any more; push the rows without it")
    lacking = [name for name in wanted.names if name not in names and name not in features]
    if lacking:
        raise PushInvalid(f"rows for view {schema.name!r} lack {lacking[0]!r}; push them again")
    return pa.schema([field for field in wanted if field.name in names])


def _fitted(schema: ViewSchema, fields: pa.Schema, rows: pa.RecordBatch) -> pa.RecordBatch:
    """Return rows with their columns cast to the types in `fields`; raise PushInvalid if a cast is not possible."""
    if rows.schema.equals(fields):
        return rows
    columns = []
    for field in fields:
        column = rows.column(field.name)
        try:
            columns.append(column.cast(field.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise PushInvalid(
                f"feature {field.name!r} of view {schema.name!r} now has type {field.type}, but {column.type} was "
                f"pushed; push the rows again"
            ) from None
    return pa.RecordBatch.from_arrays(columns, schema=fields)


def _starts(keys: _Int64s) -> _Int64s:
    """Return the position where the rows of each key begin, then the number of rows: int64[number of keys + 1].

    Args:
        keys: int64[2, rows], the hashes of each row's key, in the order of the keys; rows > 0.
    """
    is_first = np.append(True, (keys[:, 1:] != keys[:, :-1]).any(axis=0))
    return np.append(np.flatnonzero(is_first), keys.shape[1])


@kernel
def mark_superseded(order: Any, starts: Any, push: Any, event_time: Any, stored: Any, late: Any) -> None:
    """Mark the rows that are older than the stored row of their key, or than a row of an earlier push.

    Args:
        order: int64[rows], the numbers of the rows by key, then push, then event time.
        starts: int64[keys + 1], the position in `order` where each key begins.
        push, event_time: int64[rows], the push and the event time of each row.
        stored: int64[keys], the event time of each key's stored row.
        late: bool[rows], receives whether each row is superseded.
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
    """The rows that are not superseded, as one chain per key. The number of a row is its position among the rows of all
    tables.

    Args:
        keys: int64[2, all rows], the hashes of the key of each row.
        taken: int64[rows], the numbers of these rows, by key and then in the order of application; not empty.
        starts: int64[keys + 1], the position in `taken` where each key begins.
    """

    def __init__(self, tables: Sequence[_Table], keys: _Int64s, taken: _Int64s, starts: _Int64s) -> None:
        self.tables = tables
        self.keys = take_keys(keys, taken[starts[:-1]])
        """The hashes of the keys, int64[2, keys]."""
        self._taken = taken
        self._starts = starts
        self._begins = np.cumsum([0, *(table.rows.num_rows for table in tables)], dtype=np.int64)
        self.last = taken[starts[1:] - 1]
        """The number of the last row of each chain, int64[keys]."""

    def last_in(self, tables: tuple[bool, ...]) -> _Int64s:
        """Return the position of each chain's last row from the selected tables, int64[keys]; -1 if it has none."""
        is_from: _Bools = np.array(tables)[np.searchsorted(self._begins, self._taken, side="right") - 1]
        positions = np.where(is_from, np.arange(self._taken.size), -1)
        last: _Int64s = np.maximum.reduceat(positions, self._starts[:-1])
        return last

    def rows_at(self, positions: _Int64s) -> _Int64s:
        """Return the numbers of the rows at these positions; -1 for a position of -1."""
        return np.where(positions >= 0, self._taken[positions], -1)

    def values(self, field: pa.Field, rows: _Int64s, stored: pa.Array | None, is_stored: _Bools) -> pa.Array:
        """Return a column with one value per key: the value of a row, or the stored value, or null.

        Args:
            rows: int64[keys], the number of each key's row in a table with the column; -1 for the stored value or null.
            stored: the stored values of all keys; None if no value is stored.
            is_stored: bool[keys], whether the key has its stored value.
        """
        columns = []
        behind = 0
        begins = np.zeros(len(self.tables), np.int64)
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
    """Return the row that results from each chain, with all columns of the view."""
    if len(chains.tables) == 1:
        return _completed_alike(chains, version)
    schema = version.record.view_schema
    tables = chains.tables
    features = {feature.name: feature for feature in schema.features}
    last_tombstone = chains.last_in(tuple(table.is_dead for table in tables))
    holders = {name: tuple(name in table.rows.schema.names for table in tables) for name in features}
    # Most features are in the same tables as another feature: compute the result once per set of tables.
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
    """Return the same as `_completed`, for rows that all give the same features: the last row of each chain decides."""
    (table,) = chains.tables
    schema = version.record.view_schema
    rows = table.rows.take(pa.array(chains.last))
    lacking = [feature for feature in schema.features if feature.name not in rows.schema.names]
    stored = _as_stored(version, lacking, published_key_hashes(rows)) if lacking and not table.is_dead else {}
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
