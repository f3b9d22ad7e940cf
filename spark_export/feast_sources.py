"""Where a Feast feature view's rows come from, as the source of a view in views.yaml.

A source is taken as it is where that does: as a path or a table. It becomes a query where columns have other names than
the view's, where a second timestamp decides between rows, and where files hold other types than the view declares.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)")
_SQL_TYPES = {
    "bool": "BOOLEAN",
    "int32": "INT",
    "int64": "BIGINT",
    "float32": "FLOAT",
    "float64": "DOUBLE",
    "string": "STRING",
    "bytes": "BINARY",
    "timestamp": "TIMESTAMP",
    "list<int64>": "ARRAY<BIGINT>",
    "list<float32>": "ARRAY<FLOAT>",
    "list<string>": "ARRAY<STRING>",
}
_INTEGERS = (pa.int8(), pa.int16(), pa.int32())
_FITTING = {
    "bool": (pa.bool_(),),
    "int32": _INTEGERS,
    "int64": (*_INTEGERS, pa.int64()),
    "float32": (pa.float32(),),
    "float64": (pa.float32(), pa.float64()),
    "string": (pa.string(), pa.large_string()),
    "bytes": (pa.binary(), pa.large_binary()),
}
"""Type → the types of a file's column that the exporter takes for it without a cast."""


class UnmappableSource(Exception):
    """A source that views.yaml cannot name; the message says why, and what to do."""


@dataclass(frozen=True)
class Columns:
    """What is wanted of a source: columns of these names and types (a feature's, or "timestamp" for the event time), of
    which `keys` tell rows apart."""

    types: Mapping[str, str]
    keys: tuple[str, ...]
    timestamp: str | None


def map_source(source: Any, columns: Columns, repository: Path | None, *, cast: bool) -> dict[str, Any]:
    """The members of `source` in views.yaml.

    Args:
        source: a Feast batch source.
        repository: the directory to which paths of files are relative; None if only a registry is known.
        cast: convert columns to the types declared even where it is not known whether they need it.

    Raises:
        UnmappableSource: it is of a kind that Spark does not read by itself.
    """
    plain = _plain_source(source, repository)
    found = _file_types(plain)
    names = {wanted: column for column, wanted in (source.field_mapping or {}).items()}
    selected = []
    for name, wanted in columns.types.items():
        column = names.get(name, name)
        if found is not None and column not in found:
            raise UnmappableSource(f"{plain['path']} has no column {column!r}; it has {', '.join(found)}")
        selected.append(_selected(name, column, wanted, found[column] if found is not None else None, cast=cast))
    created = source.created_timestamp_column or None
    if created is None and selected == [_quoted(name) for name in columns.types]:
        return plain
    if "options" in plain:
        raise UnmappableSource(
            f"a query cannot carry the options of its {plain['format']} format; make it a table of Spark's catalog"
        )
    relation = _relation(plain)
    if created is not None:
        # Of rows with one key and one event time, Feast takes the one that was created last.
        keys = ", ".join(_quoted(names.get(key, key)) for key in columns.keys)
        times = [names.get(time, time) for time in (columns.timestamp, created) if time]
        order = ", ".join(f"{_quoted(time)} DESC" for time in times)
        relation = (
            f"(SELECT *, row_number() OVER (PARTITION BY {keys} ORDER BY {order}) AS __newest FROM {relation}) "
            f"WHERE __newest = 1"
        )
    return {"sql": f"SELECT {', '.join(selected)} FROM {relation}"}


def _plain_source(source: Any, repository: Path | None) -> dict[str, Any]:
    kind = type(source).__name__
    match kind:
        case "FileSource":
            of_delta = type(source.file_format).__name__ == "DeltaFormat"
            return {"path": _location(source.path, repository), "format": "delta" if of_delta else "parquet"}
        case "SparkSource" if source.table:
            return {"table": source.table}
        case "SparkSource" if source.query:
            return {"sql": source.query.rstrip("; \n")}
        case "SparkSource" if source.path:
            return _spark_files(source, repository)
    raise UnmappableSource(
        f"its source {source.name!r} is a {kind}, which Spark does not read by itself; make it a table of Spark's "
        f"catalog, and give the view a source with table or sql"
    )


def _spark_files(source: Any, repository: Path | None) -> dict[str, Any]:
    table_format = source.table_format
    if table_format is None and not source.file_format:
        raise UnmappableSource(f"its source {source.name!r} has a path and no file_format; give it one in Feast")
    members = {"path": _location(source.path, repository)}
    if table_format is None:
        return members | {"format": source.file_format}
    options = dict(sorted(table_format.properties.items()))
    return members | {"format": table_format.format_type.value} | ({"options": options} if options else {})


def _location(path: str, repository: Path | None) -> str:
    scheme = _SCHEME.fullmatch(path)
    if scheme is None:
        if repository is None and not os.path.isabs(path):
            raise UnmappableSource(
                f"its path {path!r} is relative to the repository, of which only the registry is given; give the "
                f"repository"
            )
        return os.path.abspath(repository / path if repository else path)
    if scheme[1] == "file":
        return scheme[2]
    # Hadoop's client of S3 knows its own scheme alone.
    return f"s3a://{scheme[2]}" if scheme[1] == "s3" else path


def _file_types(plain: Mapping[str, Any]) -> dict[str, pa.DataType] | None:
    """The columns of Parquet files on this machine; None of whatever else."""
    path = plain.get("path", "")
    if plain.get("format") != "parquet" or not os.path.exists(path):
        return None
    try:
        # Imported here: it brings pandas along, which takes a fifth of the time in which any command starts.
        import pyarrow.dataset

        schema = pyarrow.dataset.dataset(path, format="parquet").schema
    except (OSError, pa.ArrowInvalid):
        return None
    return {field.name: field.type for field in schema}


def _selected(name: str, column: str, wanted: str, found: pa.DataType | None, *, cast: bool) -> str:
    """A column of a query that brings a source's column to the name and the type wanted."""
    source = _quoted(column)
    if wanted == "timestamp":
        # Never cast unseen: of integers, Spark would make seconds. What fits not is for the exporter to refuse.
        in_nanoseconds = found is not None and pa.types.is_timestamp(found) and found.unit == "ns"
        expression = f"timestamp_micros({source} DIV 1000)" if in_nanoseconds else source
    elif cast or (found is not None and not _fits(found, wanted)):
        expression = f"CAST({source} AS {_sql_type(wanted)})"
    else:
        expression = source
    return expression if expression == _quoted(name) else f"{expression} AS {_quoted(name)}"


def _fits(found: pa.DataType, wanted: str) -> bool:
    if pa.types.is_dictionary(found):
        found = found.value_type
    if wanted in _FITTING:
        return found in _FITTING[wanted]
    is_list = pa.types.is_list(found) or pa.types.is_large_list(found) or pa.types.is_fixed_size_list(found)
    return is_list and found.value_type in _FITTING[_item_type(wanted)]


def _item_type(wanted: str) -> str:
    return wanted.removeprefix("list<").removesuffix(">").partition("[")[0]


def _relation(plain: Mapping[str, Any]) -> str:
    if "sql" in plain:
        return f"({plain['sql']})"
    if "table" in plain:
        return str(plain["table"])
    path = f"file://{plain['path']}" if plain["path"].startswith("/") else plain["path"]
    return f"{plain['format']}.{_quoted(path)}"


def _sql_type(of: str) -> str:
    return _SQL_TYPES["list<float32>" if of.startswith("float32[") else of]


def _quoted(name: str) -> str:
    escaped = name.replace("`", "``")
    return f"`{escaped}`"
