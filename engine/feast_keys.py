"""The keys for comparing Feast and Shoal: read from a file, or sampled from a store."""

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from engine.errors import LookupInvalid
from engine.schema import JoinKey, arrow_type
from engine.version import StoreVersion, ViewVersion


def read_keys(path: Path, types: Mapping[str, str]) -> dict[str, list[Any]]:
    """The distinct keys of a Parquet or CSV file, from its columns of the join keys' names.

    Raises:
        LookupInvalid: it cannot be read, lacks a join key, or holds nulls or values of another type.
    """
    try:
        table = _read_table(path, types)
    except (OSError, pa.ArrowInvalid) as error:
        raise LookupInvalid(f"cannot read keys from {path}: {error}; give Parquet, or .csv with a header") from None
    if missing := [name for name in types if name not in table.column_names]:
        raise LookupInvalid(f"{path} lacks the join key {missing[0]!r}; the requested features need {', '.join(types)}")
    columns = {}
    for name, of in types.items():
        column = table[name]
        if column.null_count:
            raise LookupInvalid(f"{path}: column {name!r} has {column.null_count} nulls; leave such rows out")
        try:
            columns[name] = column.cast(arrow_type(of))
        except pa.ArrowInvalid as error:
            raise LookupInvalid(f"{path}: column {name!r} is {column.type}, the join key {of}: {error}") from None
    distinct = pa.table(columns).group_by([*columns], use_threads=False).aggregate([])
    if not distinct.num_rows:
        raise LookupInvalid(f"{path} holds no rows; give some keys")
    return {name: distinct[name].to_pylist() for name in types}


def sample_keys(version: StoreVersion, views: Sequence[str], count: int) -> dict[str, list[Any]]:
    """Keys of rows that lie evenly spread over the views' bases, the same each time.

    Views of several join keys are sampled first; a key that is there already is not sampled for another view.

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
            raise LookupInvalid(f"the base of view {view.name!r} is empty; give keys by --keys or --key")
        for position, name in enumerate(key.name for key in view.join_keys):
            columns.setdefault(name, [key[position] for key in sampled])
    rows = max(len(values) for values in columns.values())
    return {name: [values[row % len(values)] for row in range(rows)] for name, values in columns.items()}


def _read_table(path: Path, types: Mapping[str, str]) -> pa.Table:
    if path.suffix.lower() == ".csv":
        options = pyarrow.csv.ConvertOptions(column_types={name: arrow_type(of) for name, of in types.items()})
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
    """The values of a key as a chunk holds it."""
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
