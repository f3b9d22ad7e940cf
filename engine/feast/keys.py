"""The keys for comparing Feast and Shoal: read from a file, or sampled from a store."""

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from shoal.engine.base.errors import LookupInvalid
from shoal.engine.format.schema import JoinKey, arrow_type
from shoal.engine.store.version import StoreVersion, ViewVersion


def read_keys(path: Path, types: Mapping[str, str]) -> dict[str, list[Any]]:
    """Return the distinct keys of a Parquet or CSV file, from the columns that have the names of the join keys.

    Raises:
        LookupInvalid: the file cannot be read, has no rows, lacks a join key, or has nulls or values of another type.
    """
    try:
        table = _read_table(path, types)
    except (OSError, pa.ArrowInvalid) as error:
        raise LookupInvalid(f"cannot read keys from {path}: {error}; give Parquet, or .csv with a header") from None
    if missing := [name for name in types if name not in table.column_names]:
        raise LookupInvalid(f"{path} lacks the join key {missing[0]!r}; the requested features need {', '.join(types)}")
    columns = {}
    for name, type_name in types.items():
        column = table[name]
        if column.null_count:
            raise LookupInvalid(f"{path}: column {name!r} has {column.null_count} nulls; leave such rows out")
        try:
            columns[name] = column.cast(arrow_type(type_name))
        except pa.ArrowInvalid as error:
            raise LookupInvalid(
                f"{path}: column {name!r} is {column.type}, the join key is {type_name}: {error}"
            ) from None
    distinct = pa.table(columns).group_by([*columns], use_threads=False).aggregate([])
    if not distinct.num_rows:
        raise LookupInvalid(f"{path} contains no rows; give at least one key")
    return {name: distinct[name].to_pylist() for name in types}


def sample_keys(version: StoreVersion, views: Sequence[str], count: int) -> dict[str, list[Any]]:
    """Return the keys of rows that are evenly spread over the views' bases. Each call returns the same keys.

    Views with the most join keys are sampled first. A view is skipped if all of its join keys are already sampled.

    Raises:
        UnknownFeature: the store has no such view.
        LookupInvalid: a view's base is empty.
    """
    columns: dict[str, list[Any]] = {}
    for view in sorted(map(version.view, views), key=lambda view: -len(view.join_keys)):
        if set(view.join_key_names) <= set(columns):
            continue
        sampled = _sample(view, count)
        if not sampled:
            raise LookupInvalid(f"the base of view {view.name!r} is empty; give keys with --keys or --key")
        for position, name in enumerate(key.name for key in view.join_keys):
            columns.setdefault(name, [key[position] for key in sampled])
    rows = max(len(values) for values in columns.values())
    return {name: [values[row % len(values)] for row in range(rows)] for name, values in columns.items()}


def _read_table(path: Path, types: Mapping[str, str]) -> pa.Table:
    if path.suffix.lower() == ".csv":
        options = pyarrow.csv.ConvertOptions(
            column_types={name: arrow_type(type_name) for name, type_name in types.items()}
        )
        return pyarrow.csv.read_csv(path, convert_options=options)
    return pq.read_table(path)


def _sample(view: ViewVersion, count: int) -> list[tuple[str | int, ...]]:
    chunks = view.segments[-1].chunks
    ends = np.cumsum([chunk.header.rows for chunk in chunks], dtype=np.int64)
    rows = int(ends[-1]) if len(ends) else 0
    keys = []
    for row in np.unique(np.linspace(0, rows - 1, min(count, rows)).astype(np.int64)):
        number = int(np.searchsorted(ends, row, side="right"))
        chunk = chunks[number]
        keys.append(_decoded(chunk.key_of(int(row - ends[number] + chunk.header.rows)), view.join_keys))
    return keys


def _decoded(key: bytes, join_keys: Sequence[JoinKey]) -> tuple[str | int, ...]:
    """Decode the values of a key from the form that a chunk stores."""
    values: list[str | int] = []
    position = 0
    for join_key in join_keys:
        if join_key.type == "int64":
            values.append(int(struct.unpack_from("<q", key, position)[0]))
            position += 8
        else:
            (size,) = struct.unpack_from("<I", key, position)
            position += 4
            values.append(key[position : position + size].decode())
            position += size
    return tuple(values)
