"""Convert the batch source of a Feast feature view to the source of a view in views.yaml.

If possible, the converted source is the same path or table. It becomes a query if its columns have other names than in
the view, if a second timestamp decides between rows, or if the types in its files differ from the declared types.
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
"""Declared type → the types of a file's column that the exporter accepts without a cast."""


class UnmappableSource(Exception):
    """A source that views.yaml cannot express. The message gives the reason and the fix."""


@dataclass(frozen=True)
class Columns:
    """The columns that a view needs from its source: name → type. The type of the event time is "timestamp". `keys` are
    the names of the join keys. `timestamp` is the name of the event time column, or None if the view has no such
    column."""

    types: Mapping[str, str]
    keys: tuple[str, ...]
    timestamp: str | None


def map_source(source: Any, columns: Columns, repository: Path | None, *, cast: bool) -> dict[str, Any]:
    """Return the members of `source` in views.yaml for a Feast batch source.

    Args:
        source: a Feast batch source.
        columns: the columns that the view needs.
        repository: the directory to which paths of files are relative; None if only a registry is known.
        cast: cast a column to its declared type if the type of the column in the source is unknown.

    Raises:
        UnmappableSource: Spark cannot read the kind of source, the source lacks a column, or views.yaml cannot express
            the source for another reason.
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
        # If several rows have the same key and event time, Feast takes the row that was created last.
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
                f"its path {path!r} is relative to the repository, but only the registry is given; give the directory "
                f"of the repository"
            )
        return os.path.abspath(repository / path if repository else path)
    if scheme[1] == "file":
        return scheme[2]
    # Hadoop's S3 client only knows the scheme s3a.
    return f"s3a://{scheme[2]}" if scheme[1] == "s3" else path


def _file_types(plain: Mapping[str, Any]) -> dict[str, pa.DataType] | None:
    """Return the column types of Parquet files on this machine; None for any other source."""
    path = plain.get("path", "")
    if plain.get("format") != "parquet" or not os.path.exists(path):
        return None
    try:
        # Imported here because it imports pandas, which takes a fifth of the start time of any command.
        import pyarrow.dataset

        schema = pyarrow.dataset.dataset(path, format="parquet").schema
    except (OSError, pa.ArrowInvalid):
        return None
    return {field.name: field.type for field in schema}


def _selected(name: str, column: str, wanted: str, found: pa.DataType | None, *, cast: bool) -> str:
    """Return the SQL expression that converts a column of the source to the wanted name and type."""
    source = _quoted(column)
    if wanted == "timestamp":
        # Never cast a time column of unknown type: Spark would read integers as seconds. The exporter refuses a column
        # that contains no times.
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


def _sql_type(type_name: str) -> str:
    return _SQL_TYPES["list<float32>" if type_name.startswith("float32[") else type_name]


def _quoted(name: str) -> str:
    escaped = name.replace("`", "``")
    return f"`{escaped}`"
