"""Read a view's source, and bring it to the columns and types that are published.

No type is converted in a way that could lose or invent something; a source that needs more says so in its own query.
"""

import difflib
import os
import re
from pathlib import Path

import pyspark
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import AtomicType, StringType, StructField, StructType

from engine.errors import SourceError
from engine.manifest import EVENT_TIMESTAMP
from engine.schema import embedding_size
from spark_export.instants import instant
from spark_export.partition_texts import partition_columns, read_as_declared
from spark_export.spark_errors import raised_as
from spark_export.views import Source, ViewDefinition

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
"""Feature type → the Spark types that hold nothing else: first the one that is published, then those widened to it."""

_FILES = ("avro", "csv", "json", "orc", "parquet", "text", "xml")
"""The formats whose partition columns are names of directories and nothing else; tables of others know their types."""
_GUESSED = ("csv", "json", "xml")
"""The formats in which values are text and Spark guesses their types, of CSV only if `inferSchema` says so."""

_SAME_BUT_CASE = (
    "Spark does not tell names apart that differ in case alone: rename one, or start the export by spark-submit with "
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
    "Relative path in absolute URI": "Spark cannot read a local file whose own name has a colon, nor "
    "a path that has both a colon and one of *?[]{}\\: rename it",
}
"""Spark's message about a source → what to do about it."""

_LISTED = 20


def spark_type(feature_type: str) -> str:
    """The Spark type in which a feature of this type is published, as DDL."""
    return _fitting_types(feature_type)[0]


def open_source(view: ViewDefinition, spark: SparkSession) -> DataFrame:
    """A view's source as it is.

    Raises:
        SourceError: Spark cannot read it.
    """
    source = view.source
    assert source is not None
    with raised_as(SourceError, f"view {view.name!r}: its source ({source}) cannot be read", hint_of):
        if source.path is not None:
            return _open_files(view, source, spark)
        return spark.table(source.table) if source.table is not None else spark.sql(source.sql or "")


def _open_files(view: ViewDefinition, source: Source, spark: SparkSession) -> DataFrame:
    of = source.format.lower()
    path = file_uri(source.path or "", of)
    files = spark.read.format(source.format).options(**source.options).load(path)
    if of in _GUESSED:
        schema = _with_texts(view, files.schema)
        if schema != files.schema:
            files = spark.read.format(source.format).options(**source.options).schema(schema).load(path)
    return read_as_declared(view, files, partition_columns(files), source) if of in _FILES else files


def _with_texts(view: ViewDefinition, guessed: StructType) -> StructType:
    """Return a schema in which columns that the view declares as string are read as the text that the files have, and
    not as a number or a date that Spark makes of it."""
    strings = {key.name for key in view.join_keys if key.type == "string"}
    strings |= {feature.name for feature in view.features if feature.type == "string"}
    fields = []
    for field in guessed:
        is_guess = isinstance(field.dataType, AtomicType) and not isinstance(field.dataType, StringType)
        fields.append(StructField(field.name, StringType()) if is_guess and field.name in strings else field)
    return StructType(fields)


def file_uri(path: str, of: str) -> str:
    """Return a path of views.yaml in the form that Spark's reader expects: an escaped path if it exists, otherwise a
    pattern."""
    if not path.startswith("/"):
        return path
    # Without a scheme Spark would look on the cluster's default file system, not next to views.yaml.
    return literal_uri(Path(path)) if of in _FILES and os.path.lexists(path) else f"file://{path}"


def hint_of(said: str) -> str | None:
    """Return what to do about Spark's message on a source; None if the message says so itself."""
    return next((hint for text, hint in _HINTS.items() if text in said), None)


def literal_uri(path: Path) -> str:
    """A local path as Spark reads it, which, unlike one that it writes, it takes for a glob."""
    literal = re.sub(r"([*?{}\[\]\\])", r"\\\1", str(path))
    return f"file://{literal}"


def lineage(view: ViewDefinition, source: DataFrame) -> tuple[str, ...]:
    """What an entry is made from: the source, how many files that is, and the first of them by name."""
    files = sorted(source.inputFiles())
    counted = (f"{len(files)} file{'s' * (len(files) > 1)}", *files[:_LISTED]) if files else ()
    return (str(view.source), *counted)


def fit(view: ViewDefinition, source: DataFrame, run_time: int, named: object) -> DataFrame:
    """The source's event time, join keys and features, under their own names and in the types that are published.

    A view without a timestamp_field has the event time `run_time` (microseconds since the epoch) in every row. `named`
    is what errors call the source.

    Raises:
        SourceError: a column is missing, or of a type that does not fit the definition.
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
    # A collation says how strings compare, not which they are; hashes are of the string itself.
    found_type = re.sub(r" collate \w+", "", found[0].simpleString())
    if found_type not in fitting:
        raise SourceError(
            f"view {view.name!r}: column {name!r} of its source is {found_type}, but {wanted} takes "
            f"{' or '.join(fitting)}; correct the type in views.yaml, or cast the column in a sql source"
        )
    return F.col(f"`{name}`").cast(fitting[0])


def _fitting_types(feature_type: str) -> tuple[str, ...]:
    return _FITTING_TYPES["list<float32>" if embedding_size(feature_type) else feature_type]
