"""Read partition columns as their types in views.yaml. The values of these columns are names of directories.

Spark would guess these types: it reads `doc_id=007` as the number 7. `shoal.spark_export.source.session` turns the
guessing off, so that these columns are text. This module reads the text as the declared type. A text that is not of
that type is an error.
"""

from typing import Any

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from shoal.spark_export.source.spark_errors import raise_source_error
from shoal.spark_export.views.definition import ViewDefinition

_WHOLE = r"[+-]?[0-9]+"
_DECIMAL = r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"
_TIME = r"[0-9]{4}-[0-9]{2}-[0-9]{2}([ T][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?(Z|[+-][0-9]{2}:[0-9]{2})?)?"

_FORMS = {
    "bool": ("boolean", "(?i)true|false", "true or false"),
    "int32": ("int", _WHOLE, "a whole number of 32 bits"),
    "int64": ("bigint", _WHOLE, "a whole number of 64 bits"),
    "float32": ("float", rf"{_DECIMAL}|NaN|[+-]?Infinity", "a number of 32 bits"),
    "float64": ("double", rf"{_DECIMAL}|NaN|[+-]?Infinity", "a number of 64 bits"),
    "timestamp": ("timestamp", _TIME, "a date like 2026-01-31 or a time like 2026-01-31 12:30:00"),
}
"""Declared type → Spark's type, the valid texts (a Java regular expression), and their description in errors.

Without these patterns, Spark would also read ` 7`, `1d` and `0x1p3` as numbers, `y` as true, and `10:00` as a time of
today."""


def partition_columns(files: DataFrame) -> frozenset[str]:
    """Return the names of the partition columns of a DataFrame that Spark's reader returned."""
    plan: Any = files._jdf.queryExecution().analyzed().collectLeaves().head()
    if plan.getClass().getSimpleName() != "LogicalRelation":
        return frozenset()
    return frozenset(plan.relation().partitionSchema().fieldNames())


def read_as_declared(view: ViewDefinition, rows: DataFrame, names: frozenset[str], named: object) -> DataFrame:
    """Return the rows with the given text columns read as the types that the view declares.

    `named` is the name of the source in errors. A value that is not of the declared type makes the Spark job fail;
    `shoal.spark_export.source.spark_errors.raised_as` turns that error into a SourceError.
    """
    declared = {key.name: key.type for key in view.join_keys} | {each.name: each.type for each in view.features}
    if view.timestamp_field is not None:
        declared[view.timestamp_field] = "timestamp"
    read = {name: _value(view, name, of, named) for name, of in declared.items() if name in names}
    return rows.withColumns({name: value for name, value in read.items() if value is not None})


def read_text(text: Column, declared: str) -> Column:
    """Return a text column as a declared type, which must be a key of `_FORMS`; null if a text is not of that type."""
    of, pattern, _ = _FORMS[declared]
    value = F.when(text.rlike(rf"\A({pattern})\z"), text.try_cast(of))
    if not declared.startswith("float"):
        return value
    # Without this check, a number that is too large for the type would become infinite.
    is_too_large = F.abs(value).eqNullSafe(F.lit(float("inf"))) & ~text.contains("Infinity")
    return F.when(~is_too_large, value)


def _value(view: ViewDefinition, name: str, declared: str, named: object) -> Column | None:
    """Return a partition column as its declared type; None if the column needs no change."""
    text = F.col(f"`{name}`")
    found = F.lit(f"view {view.name!r}: the partition column {name!r} of its source ({named}) has the value '"), text
    if declared in _FORMS:
        rest = f"', which is not {declared}: {_FORMS[declared][2]}; correct the name of the directory, or the type in "
        wrong = F.concat(*found, F.lit(f"{rest}views.yaml"))
        return F.when(text.isNotNull(), F.coalesce(read_text(text, declared), raise_source_error(wrong)))
    if declared == "string":
        rest = (
            "', which seems to be percent-encoded UTF-8 misread by Spark; write the directories with Spark, or decode "
            "the column in a sql source: decode(encode("
        )
        wrong = F.concat(*found, F.lit(f"{rest}{name}, 'ISO-8859-1'), 'UTF-8')"))
        return F.when(_is_misread(text), raise_source_error(wrong)).otherwise(text)
    return None


def _is_misread(text: Column) -> Column:
    """Return a boolean column: whether a UTF-8 text was misread in such a way that each byte became a letter. pyarrow
    writes ü as `%C3%BC`. Spark and Hive write ü unescaped, and read `%C3%BC` as two letters."""
    has_only_bytes = text.rlike(r"\A[\x00-\xff]*[\x80-\xff][\x00-\xff]*\z")
    return F.when(has_only_bytes, F.is_valid_utf8(F.encode(text, "ISO-8859-1"))).otherwise(F.lit(False))
