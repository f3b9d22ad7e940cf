"""What every row of a source must hold to be published, checked by Spark while it reads the rows anyway."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from engine.errors import SourceError
from engine.layout import MAX_HEAP_VALUE
from engine.manifest import EVENT_TIMESTAMP
from engine.schema import Feature, embedding_size
from engine.times import FIRST_TIME, FURTHEST_AHEAD, LAST_TIME, shown_time
from spark_export.instants import instant
from spark_export.views import ViewDefinition


@dataclass(frozen=True)
class Check:
    """A demand on one column, where a row breaks it, and how to tell what such a row holds (string columns)."""

    column: str
    demand: str
    broken: Column
    found: Column


def checks(view: ViewDefinition, run_time: int) -> list[Check]:
    """All demands on a view's rows, which are as `spark_export.source.fit` gives them; `run_time`, in microseconds
    since 1970, is when the run or the batch began."""
    return list(_checks(view, run_time))


def flaw(demands: list[Check]) -> Column:
    """int: the position of the first demand that a row breaks; null for a sound row."""
    return F.coalesce(*(F.when(check.broken, F.lit(position)) for position, check in enumerate(demands)))


def found(demands: list[Check]) -> Column:
    """string: what a row holds where it breaks a demand, the first that `flaw` finds; null for a sound row."""
    return F.coalesce(*(F.when(check.broken, check.found) for check in demands))


def source_error(view: ViewDefinition, rows: DataFrame, demands: list[Check], broken: int, count: int) -> SourceError:
    """The error to raise when `count` rows break the demand at position `broken`; reads one of them as the example."""
    shown = [F.col(key.name).cast("string") for key in view.join_keys]
    columns = [demands[broken].found, F.col(EVENT_TIMESTAMP).cast("string"), *shown]
    row = rows.where(flaw(demands) == broken).select(*columns).first()
    example = broken_row(view, row[0], row[1:]) if row is not None else ""
    return SourceError(
        f"view {view.name!r}: {broken_demand(demands[broken], count)}{example}; nothing was published; mend the "
        f"source, or leave such rows out by a sql source"
    )


def broken_demand(check: Check, count: int) -> str:
    """What an error says of a demand that `count` rows break."""
    return f"column {check.column!r} of its source {check.demand}, but {count} row(s) break that"


def broken_row(view: ViewDefinition, value: object, identity: Iterable[object]) -> str:
    """An example of such a row: what it has, and its event time and join keys."""
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
    name, column = feature.name, F.col(feature.name)
    size, length = F.array_size(column), embedding_size(feature.type)
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
        # Beside its bytes it takes 4 for its length and for the end of each string; `joined` counts the separators.
        yield _size_check(name, F.octet_length(joined) + 3 * size + 5)
    elif feature.type.startswith("list<"):
        yield _size_check(name, (8 if feature.type == "list<int64>" else 4) * size)


def _event_time_checks(view: ViewDefinition, name: str, run_time: int) -> Iterator[Check]:
    column = F.col(EVENT_TIMESTAMP)
    yield Check(name, "is the event time and must not be null", column.isNull(), F.lit("null"))
    yield _range_check(name, column)
    if view.future == "refuse":
        # A row from years ahead would make all rows of its key late that come after it.
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
