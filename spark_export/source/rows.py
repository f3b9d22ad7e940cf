"""Read a view's source, and convert it to the published columns and types.

Only lossless conversions of types are done here. A source that needs other conversions must do them in its own query.
"""

import difflib
import os
import re
from pathlib import Path

import pyspark
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import AtomicType, StringType, StructField, StructType

from shoal.engine.base.errors import SourceError
from shoal.engine.format.schema import embedding_size
from shoal.engine.root.manifest import EVENT_TIMESTAMP
from shoal.spark_export.source.instants import instant
from shoal.spark_export.source.partition_texts import partition_columns, read_as_declared
from shoal.spark_export.source.spark_errors import raised_as
from shoal.spark_export.views.definition import Source, ViewDefinition

_FITTING_TYPES = {
    "bool": ("boolean",),
    "int32": ("int", "smallint", "tinyint"),
    "int64": ("bigint", "int", "smallint", "tinyint"),
    "float32": ("float",),
    "float64": ("double", "float"),
    "string": ("string",),
    "bytes": ("binary",),
    "timestamp": ("timestamp", "timestamp_ntz", "date"),
    "list<int64>": ("array<bigint>", "array<int>", "array<smallint>", "array<tinyint>"),
    "list<float32>": ("array<float>",),
    "list<string>": ("array<string>",),
}
"""Feature type → the Spark types that are accepted for it: first the published type, then the types widened to it."""

_FILES = ("avro", "csv", "json", "orc", "parquet", "text", "xml")
"""The formats that store partition columns only as directory names. Tables in other formats know the columns' types."""
_GUESSED = ("csv", "json", "xml")
"""The formats that store values as text. Spark guesses the types of these values; for CSV, only with `inferSchema`."""

_SAME_BUT_CASE = (
    "Spark ignores letter case in column names: rename one, or start the export by spark-submit with "
    "--conf spark.sql.caseSensitive=true"
)
_HINTS = {
    "AVRO_DATA_SOURCE_NOT_ENABLED": f"give --package org.apache.spark:spark-avro_2.13:{pyspark.__version__}",
    "Failed to find the data source: delta": "give --package io.delta:delta-spark_2.13:VERSION, in the version that "
    f"goes with Spark {pyspark.__version__}",
    "Failed to find data source: kafka": "give --package org.apache.spark:spark-sql-kafka-0-10_2.13:"
    f"{pyspark.__version__}",
    "DATA_SOURCE_NOT_FOUND": "correct the format, or name its package: --package GROUP:ARTIFACT:VERSION",
    "COLUMN_ALREADY_EXISTS": _SAME_BUT_CASE,
    "Relative path in absolute URI": "Spark cannot read a local file with a colon in its own name, nor "
    "a path with both a colon and one of *?[]{}\\: rename it",
}
"""Fragment of a Spark message about a source → the fix."""

_LISTED = 20


def spark_type(feature_type: str) -> str:
    """Return the Spark type, as DDL, in which a feature of the given type is published."""
    return _fitting_types(feature_type)[0]


def open_source(view: ViewDefinition, spark: SparkSession) -> DataFrame:
    """Return the rows of a view's source, unconverted except for partition columns and guessed types.

    Raises:
        SourceError: Spark cannot read the source.
    """
    source = view.source
    assert source is not None
    with raised_as(SourceError, f"view {view.name!r}: its source ({source}) cannot be read", hint_of):
        if source.path is not None:
            return _open_files(view, source, spark)
        return spark.table(source.table) if source.table is not None else spark.sql(source.sql or "")


def _open_files(view: ViewDefinition, source: Source, spark: SparkSession) -> DataFrame:
    source_format = source.format.lower()
    path = file_uri(source.path or "", source_format)
    files = spark.read.format(source.format).options(**source.options).load(path)
    if source_format in _GUESSED:
        schema = _with_texts(view, files.schema)
        if schema != files.schema:
            files = spark.read.format(source.format).options(**source.options).schema(schema).load(path)
    return read_as_declared(view, files, partition_columns(files), source) if source_format in _FILES else files


def _with_texts(view: ViewDefinition, guessed: StructType) -> StructType:
    """Return the guessed schema with string as the type of every column that the view declares as string. Spark then
    reads the original text instead of a number or a date."""
    strings = {key.name for key in view.join_keys if key.type == "string"}
    strings |= {feature.name for feature in view.features if feature.type == "string"}
    fields = []
    for field in guessed:
        is_guess = isinstance(field.dataType, AtomicType) and not isinstance(field.dataType, StringType)
        fields.append(StructField(field.name, StringType()) if is_guess and field.name in strings else field)
    return StructType(fields)


def file_uri(path: str, source_format: str) -> str:
    """Return a path of views.yaml in the form that Spark's reader expects: an escaped path if it exists, otherwise a
    pattern."""
    if not path.startswith("/"):
        return path
    # Without a scheme Spark would look on the cluster's default file system, not next to views.yaml.
    return literal_uri(Path(path)) if source_format in _FILES and os.path.lexists(path) else f"file://{path}"


def hint_of(said: str) -> str | None:
    """Return the fix for a Spark message about a source; None if no fix is known."""
    return next((hint for text, hint in _HINTS.items() if text in said), None)


def literal_uri(path: Path) -> str:
    """Return a local path as a URI for Spark's readers. Escape glob characters, because Spark's readers treat a path as
    a glob pattern. Spark's writers do not."""
    literal = re.sub(r"([*?{}\[\]\\])", r"\\\1", str(path))
    return f"file://{literal}"


def lineage(view: ViewDefinition, source: DataFrame) -> tuple[str, ...]:
    """Return the inputs of an entry for its manifest: the source, its number of files, and the first files by name."""
    files = sorted(source.inputFiles())
    counted = (f"{len(files)} file{'s' * (len(files) > 1)}", *files[:_LISTED]) if files else ()
    return (str(view.source), *counted)


def conform(view: ViewDefinition, source: DataFrame, run_time: int, named: object) -> DataFrame:
    """Return the source's event time, join keys and features, with the names and types in which they are published.

    The event time column is called `__event_timestamp`. In a view without a timestamp_field, every row has the event
    time `run_time` (microseconds since the epoch). `named` is the name of the source in errors.

    Raises:
        SourceError: a column is missing, or its type does not fit the definition.
    """
    if view.timestamp_field is None:
        columns = [instant(run_time)]
    else:
        columns = [_column(view, source, view.timestamp_field, "timestamp", named)]
    columns = [columns[0].alias(EVENT_TIMESTAMP)]
    columns += [_column(view, source, key.name, key.type, named).alias(key.name) for key in view.join_keys]
    for feature in view.features:
        columns.append(_column(view, source, feature.name, feature.type, named).alias(feature.name))
    return source.select(columns)


def _column(view: ViewDefinition, source: DataFrame, name: str, wanted: str, named: object) -> Column:
    found = [field.dataType for field in source.schema if field.name == name]
    if not found:
        same = [column for column in source.columns if column.lower() == name.lower()]
        closest = same or difflib.get_close_matches(name, source.columns, n=1)
        more = ", …" if len(source.columns) > _LISTED else ""
        raise SourceError(
            f"view {view.name!r}: its source ({named}) has no column {name!r}; it has "
            f"{', '.join(source.columns[:_LISTED])}{more}"
            + (f"; did you mean {closest[0]!r}?" if closest else "; correct views.yaml or the source")
        )
    alike = [column for column in source.columns if column.lower() == name.lower()]
    if len(alike) > 1 and source.sparkSession.conf.get("spark.sql.caseSensitive") != "true":
        names = " and ".join(map(repr, alike))
        raise SourceError(f"view {view.name!r}: its source ({named}) has the columns {names}; {_SAME_BUT_CASE}")
    fitting = _fitting_types(wanted)
    # A collation only affects how strings compare. Hashes are computed from the string itself.
    found_type = re.sub(r" collate \w+", "", found[0].simpleString())
    if found_type not in fitting:
        raise SourceError(
            f"view {view.name!r}: column {name!r} of its source is {found_type}, but {wanted} takes "
            f"{' or '.join(fitting)}; correct the type in views.yaml, or cast the column in a sql source"
        )
    return F.col(f"`{name}`").cast(fitting[0])


def _fitting_types(feature_type: str) -> tuple[str, ...]:
    return _FITTING_TYPES["list<float32>" if embedding_size(feature_type) else feature_type]
