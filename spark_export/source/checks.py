"""The checks that every row of a source must pass to be published. Spark runs them in the same pass as the export."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from shoal.engine.base.errors import SourceError
from shoal.engine.base.times import FIRST_TIME, FURTHEST_AHEAD, LAST_TIME, shown_time
from shoal.engine.format.layout import MAX_HEAP_VALUE
from shoal.engine.format.schema import Feature, embedding_size
from shoal.engine.root.manifest import EVENT_TIMESTAMP
from shoal.spark_export.source.instants import instant
from shoal.spark_export.views.definition import ViewDefinition


@dataclass(frozen=True)
class Check:
    """A check of one column. `broken` is a boolean column: whether a row fails the check. `found` is a string column:
    the value of such a row for an error message."""

    column: str
    demand: str
    broken: Column
    found: Column


def checks(view: ViewDefinition, run_time: int) -> list[Check]:
    """Return all checks of the rows of a view, as returned by `shoal.spark_export.source.rows.conform`. `run_time` is
    the start of the run or the batch in microseconds since 1970."""
    return list(_checks(view, run_time))


def first_problem(demands: list[Check]) -> Column:
    """Return an int column: the position of the first check that a row fails; null if it fails none."""
    return F.coalesce(*(F.when(check.broken, F.lit(position)) for position, check in enumerate(demands)))


def found(demands: list[Check]) -> Column:
    """Return a string column: the value of a row that fails the check of `first_problem`; null for other rows."""
    return F.coalesce(*(F.when(check.broken, check.found) for check in demands))


def source_error(view: ViewDefinition, rows: DataFrame, demands: list[Check], broken: int, count: int) -> SourceError:
    """Return the error for `count` rows that fail the check at position `broken`. Read one of them as the example."""
    shown = [F.col(key.name).cast("string") for key in view.join_keys]
    columns = [demands[broken].found, F.col(EVENT_TIMESTAMP).cast("string"), *shown]
    row = rows.where(first_problem(demands) == broken).select(*columns).first()
    example = broken_row(view, row[0], row[1:]) if row is not None else ""
    return SourceError(
        f"view {view.name!r}: {broken_demand(demands[broken], count)}{example}; nothing was published; correct the "
        f"source, or exclude such rows with a sql source"
    )


def broken_demand(check: Check, count: int) -> str:
    """Return the part of an error message about a check that `count` rows fail."""
    return f"column {check.column!r} of its source {check.demand}, but {count} row(s) break that"


def broken_row(view: ViewDefinition, value: object, identity: Iterable[object]) -> str:
    """Return the part of an error message with an example row: its wrong value, its event time and its join keys."""
    names = ("event time", *(key.name for key in view.join_keys))
    return f", such as the one with {', '.join(map('{} {}'.format, names, identity))}, which has {value}"


def _checks(view: ViewDefinition, run_time: int) -> Iterator[Check]:
    for key in view.join_keys:
        column = F.col(key.name)
        yield Check(key.name, "is a join key and must not be null", column.isNull(), F.lit("null"))
        if key.type == "string":
            yield from _string_checks(key.name, column)
    if view.timestamp_field is not None:
        yield from _event_time_checks(view, view.timestamp_field, run_time)
    for feature in view.features:
        yield from _value_checks(feature)


def _value_checks(feature: Feature) -> Iterator[Check]:
    name = feature.name
    column = F.col(feature.name)
    size = F.array_size(column)
    length = embedding_size(feature.type)
    if feature.type == "string":
        yield from _string_checks(name, column)
    elif feature.type == "timestamp":
        yield _range_check(name, column)
    elif feature.type == "bytes":
        yield _size_check(name, F.octet_length(column))
    elif length or feature.type.startswith("list<"):
        yield Check(name, "must not hold null elements", F.exists(column, _is_null), F.lit("one"))
    if length:
        yield Check(name, f"must have exactly {length} elements", size != length, size.cast("string"))
    elif feature.type == "list<string>":
        joined = F.array_join(column, "\n")
        yield Check(name, "must be UTF-8", ~F.is_valid_utf8(joined), F.lit("other bytes"))
        # A list takes its bytes, plus 4 bytes for its length and 4 for the end of each string. `joined` already has one
        # byte per separator.
        yield _size_check(name, F.octet_length(joined) + 3 * size + 5)
    elif feature.type.startswith("list<"):
        yield _size_check(name, (8 if feature.type == "list<int64>" else 4) * size)


def _event_time_checks(view: ViewDefinition, name: str, run_time: int) -> Iterator[Check]:
    column = F.col(EVENT_TIMESTAMP)
    yield Check(name, "is the event time and must not be null", column.isNull(), F.lit("null"))
    yield _range_check(name, column)
    if view.future == "refuse":
        # A row with an event time years ahead would make all later rows of its key late.
        latest = run_time + FURTHEST_AHEAD // timedelta(microseconds=1)
        demand = f"must not be more than a day after the time of the run, {shown_time(run_time)}, unless the view has "
        yield Check(name, f"{demand}`future: allow`", column > instant(latest), column.cast("string"))


def _range_check(name: str, column: Column) -> Check:
    outside = ~column.between(instant(FIRST_TIME), instant(LAST_TIME))
    return Check(name, "must lie in the years 1 to 9999", outside, column.cast("string"))


def _string_checks(name: str, column: Column) -> Iterator[Check]:
    yield Check(name, "must be UTF-8", ~F.is_valid_utf8(column), F.lit("other bytes"))
    yield _size_check(name, F.octet_length(column))


def _size_check(name: str, size: Column) -> Check:
    demand = f"must not take more than {MAX_HEAP_VALUE} bytes"
    return Check(name, demand, size > MAX_HEAP_VALUE, size.cast("string"))


def _is_null(element: Column) -> Column:
    return element.isNull()
