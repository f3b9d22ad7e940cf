"""Find what changed: compare a source's rows with the rows shipped before, and store the result as a ledger.

A ledger has one row, with a verdict, for each row of the source and for each key that vanished from the source. The
ledger is written once, as Parquet, and has three uses. Its counts go into the report. Its verdicts select the rows of
the entry. The next run compares the source with the ledger. The ledger contains hashes instead of values, so a run does
not read the files that earlier runs published. Its columns:

    __key_hash, __key_hash_2   bigint     the two hashes of the key
    __row_hash                 bigint     the hash of the shipped values of the features without a tolerance;
                                          null if the key is gone
    __event_timestamp          timestamp  the shipped event time
    <feature with a tolerance>            the shipped value, so that small changes cannot add up unnoticed
    __values_0, …              bigint     one bit per feature: whether the shipped row has a value (`value_counts.py`).
                                          For a key that this run removes: whether the removed row had a value
    __seen                     timestamp  the event time in the source, if it differs from the shipped event time
    __verdict                  string     a Verdict; for an invalid row, the number of the check that it fails
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from functools import reduce
from operator import and_
from typing import Any

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from shoal.engine.base.removal_memory import removals_kept
from shoal.engine.base.times import time_before, to_datetime
from shoal.engine.format.keys import KEY_HASH, KEY_HASH_2
from shoal.engine.root.manifest import EVENT_TIMESTAMP
from shoal.spark_export.changes.hashes import key_hash_columns, row_hash
from shoal.spark_export.changes.low_watermark import Ages
from shoal.spark_export.changes.value_counts import sums, word_names, words
from shoal.spark_export.source.instants import instant
from shoal.spark_export.source.rows import spark_type
from shoal.spark_export.views.definition import ViewDefinition

ROW_HASH = "__row_hash"
SEEN = "__seen"
VERDICT = "__verdict"
KEY = [KEY_HASH, KEY_HASH_2]

_SHIPPED = "__shipped"
_FLAW = "__flaw"
_OWN_AGE = "__own_age"
_RANK = "__rank"
_MICROSECOND = timedelta(microseconds=1)


class Verdict(StrEnum):
    """The result of comparing one row of the source, or one key that is no longer in the source."""

    NEW = "new"
    CHANGED = "changed"
    REFRESHED = "refreshed"
    """The values are unchanged, but the row is shipped because of its event time: the row would expire too early, or it
    gets or loses an age of its own (see `shoal.spark_export.changes.low_watermark`)."""
    UNCHANGED = "unchanged"
    LATE = "late"
    """The values differ, but the event time is older than the shipped one, so nodes would keep the shipped row."""
    DUPLICATE = "duplicate"
    """Another row with the same key ranks higher, usually because its event time is newer."""
    REMOVED = "removed"
    GONE = "gone"
    """An earlier run removed the key. The ledger keeps the key's last event time to recognize late rows, because nodes
    keep it too."""


SHIPPED = (Verdict.NEW, Verdict.CHANGED, Verdict.REFRESHED)


@dataclass(frozen=True)
class Tally:
    """The number of rows per verdict (`counts`), the number of rows per failed check (`flaws`), and the newest event
    time in the source (`watermark`).

    `live_rows` is the number of rows of the view after the run. `values` is the number of these rows with a value, by
    feature. `removed_values` counts the same for the rows that the run removes. `values` is None if the ledger was
    written by an older version, because such a ledger has no bits to count.
    """

    counts: dict[Verdict, int]
    flaws: dict[int, int]
    watermark: datetime | None
    live_rows: int
    values: dict[str, int] | None
    removed_values: dict[str, int]

    @property
    def shipped(self) -> int:
        """How many of the source's rows a delta contains: the new, changed and refreshed ones."""
        return sum(self.counts[verdict] for verdict in SHIPPED)

    @property
    def live_before(self) -> int:
        """The number of rows of the view before the run. It is only valid if the run had a state to compare with."""
        return self.live_rows - self.counts[Verdict.NEW] + self.counts[Verdict.REMOVED]


def with_hashes(view: ViewDefinition, rows: DataFrame) -> DataFrame:
    """Add the columns `__key_hash`, `__key_hash_2` and `__row_hash` to rows that conform to their view."""
    first, second = key_hash_columns(view.join_keys)
    exact = [feature for feature in view.features if feature.tolerance is None]
    return rows.withColumns({KEY_HASH: first, KEY_HASH_2: second, ROW_HASH: row_hash(exact)})


def newest_first(view: ViewDefinition, *partition: str) -> Column:
    """Return an int column: the rank of a row among the rows of its partition, 1 for the newest row. The order is
    total, except between equal rows."""
    ties = [F.desc(ROW_HASH), *(F.desc(feature.name) for feature in view.tolerant_features)]
    return F.row_number().over(Window.partitionBy(*partition).orderBy(F.desc(EVENT_TIMESTAMP), *ties))


def verdicts(view: ViewDefinition, rows: DataFrame, flaw: Column, state: DataFrame | None, ages: Ages) -> DataFrame:
    """Return the ledger of a run.

    Args:
        rows: the rows of the source, as returned by `with_hashes`.
        flaw: the column of `shoal.spark_export.source.checks.first_problem`.
        state: the rows shipped before, as returned by `shipped_before`; None to ship everything.
        ages: the low watermarks before and after this run.
    """
    tolerant = [feature.name for feature in view.tolerant_features]
    kept = [*KEY, ROW_HASH, EVENT_TIMESTAMP, *tolerant]
    source = rows.select(*kept, *words(view), flaw.alias(_FLAW)).withColumn(_RANK, newest_first(view, *KEY))
    unsound = F.when(F.col(_FLAW).isNotNull(), F.col(_FLAW).cast("string"))
    unsound = unsound.when(F.col(_RANK) > 1, Verdict.DUPLICATE)
    if state is None:
        verdict = unsound.otherwise(Verdict.NEW)
        seen = F.lit(None).cast("timestamp").alias(SEEN)
        return source.select(*kept, *word_names(view), seen, verdict.alias(VERDICT))

    shipped = {name: F.col(_SHIPPED + name) for name in (ROW_HASH, EVENT_TIMESTAMP, *tolerant, *word_names(view))}
    state = state.withColumnsRenamed({name: _SHIPPED + name for name in shipped})
    is_served = shipped[ROW_HASH].isNotNull()
    event_time = F.col(EVENT_TIMESTAMP)
    verdict = (
        unsound.when(F.col(_RANK).isNull() & is_served, Verdict.REMOVED)
        .when(F.col(_RANK).isNull(), Verdict.GONE)
        .when(shipped[EVENT_TIMESTAMP].isNull(), Verdict.NEW)
        .when(~_is_same(view, shipped) & (event_time < shipped[EVENT_TIMESTAMP]), Verdict.LATE)
        .when(~is_served, Verdict.NEW)
        .when(~_is_same(view, shipped), Verdict.CHANGED)
        .when(event_time < shipped[EVENT_TIMESTAMP], Verdict.UNCHANGED)
        .when(F.coalesce(F.col(_OWN_AGE) != ages.own(event_time), F.lit(True)), Verdict.REFRESHED)
        .when(ages.needs_renewal(view, event_time, shipped[EVENT_TIMESTAMP]), Verdict.REFRESHED)
        .otherwise(Verdict.UNCHANGED)
    )
    judged = source.join(state, KEY, "full_outer").withColumn(VERDICT, verdict)
    ships = F.col(VERDICT).isin(*SHIPPED)
    of_row_hash = F.when(ships, F.col(ROW_HASH)).when(F.col(VERDICT) != Verdict.REMOVED, shipped[ROW_HASH])
    others = [F.when(ships, F.col(name)).otherwise(shipped[name]).alias(name) for name in (EVENT_TIMESTAMP, *tolerant)]
    # An unchanged row has the shipped values, even if its state was written by a version that stored no bits.
    is_as_shipped = ships | (F.col(VERDICT) == Verdict.UNCHANGED)
    for name in word_names(view):
        of_served = F.when(is_served, F.coalesce(shipped[name], F.col(name)))
        others.append(F.when(is_as_shipped, F.col(name)).otherwise(of_served).alias(name))
    seen = F.when(~ships & ~event_time.eqNullSafe(shipped[EVENT_TIMESTAMP]), event_time)
    return judged.select(*KEY, of_row_hash.alias(ROW_HASH), *others, seen.alias(SEEN), VERDICT)


def ledger_columns(view: ViewDefinition) -> str:
    """Return the columns of a ledger as DDL."""
    columns = {KEY_HASH: "bigint", KEY_HASH_2: "bigint", ROW_HASH: "bigint", EVENT_TIMESTAMP: "timestamp"}
    columns |= {feature.name: spark_type(feature.type) for feature in view.tolerant_features}
    columns |= dict.fromkeys(word_names(view), "bigint")
    columns |= {SEEN: "timestamp", VERDICT: "string"}
    return ", ".join(f"`{name}` {kind}" for name, kind in columns.items())


def shipped_before(view: ViewDefinition, ledger: DataFrame, run_time: int, ages: Ages) -> DataFrame:
    """Return the shipped rows from an earlier run's ledger, one row per key.

    A column says whether nodes judge the age of the row only by the row's own event time. It is null if that is not
    known, because the source had gone back to an older row.
    """
    own_age = F.when(~_went_back(), ages.owned_before(F.coalesce(SEEN, EVENT_TIMESTAMP)))
    ledger = ledger.withColumn(_OWN_AGE, own_age)
    is_remembered = F.col(EVENT_TIMESTAMP) >= instant(time_before(run_time, removals_kept(view.ttl) // _MICROSECOND))
    ledger = ledger.where(F.col(VERDICT) != Verdict.DUPLICATE)
    return ledger.where(F.col(ROW_HASH).isNotNull() | is_remembered).drop(SEEN, VERDICT)


def goes_back(ledger: DataFrame) -> bool:
    """Return whether an earlier run's ledger shows that the source had an older row than the shipped row for any live
    key."""
    return not ledger.where(_went_back() & F.col(ROW_HASH).isNotNull()).isEmpty()


def _went_back() -> Column:
    is_older = (F.col(SEEN) < F.col(EVENT_TIMESTAMP)) | (F.col(VERDICT) == Verdict.LATE)
    # A duplicate is not counted: it may be older than the shipped row, but the source has a newer row of the same key.
    return F.coalesce(is_older & (F.col(VERDICT) != Verdict.DUPLICATE), F.lit(False))


def tally(view: ViewDefinition, ledger: DataFrame) -> Tally:
    """Return the counts of a ledger."""
    newest = F.unix_micros(F.max(F.coalesce(SEEN, EVENT_TIMESTAMP)))
    counted = [F.count(F.lit(1)), newest, F.count(ROW_HASH), F.count(word_names(view)[0]), *sums(view)]
    found = {verdict: numbers for verdict, *numbers in ledger.groupBy(VERDICT).agg(*counted).collect()}
    counts = dict.fromkeys(Verdict, 0)
    counts |= {Verdict(verdict): count for verdict, (count, *_) in found.items() if not verdict.isdigit()}
    flaws = {int(flaw): count for flaw, (count, *_) in found.items() if flaw.isdigit()}
    times = [micros for _, micros, *_ in found.values() if micros is not None]
    live = [found[verdict] for verdict in (*SHIPPED, Verdict.UNCHANGED, Verdict.LATE) if verdict in found]
    live_rows, with_bits = (sum(numbers[place] for numbers in live) for place in (2, 3))
    return Tally(
        counts=counts,
        flaws=flaws,
        watermark=to_datetime(max(times)) if times and not flaws else None,
        live_rows=live_rows,
        values=_by_feature(view, live) if with_bits == live_rows else None,
        removed_values=_by_feature(view, [found[Verdict.REMOVED]] if Verdict.REMOVED in found else []),
    )


def _by_feature(view: ViewDefinition, groups: list[list[Any]]) -> dict[str, int]:
    """Return the number of values by feature, summed over groups of `tally`. The counts are the last items of a group;
    null counts as 0, because it comes from a group without bits."""
    return {
        feature.name: sum(numbers[4 + position] or 0 for numbers in groups)
        for position, feature in enumerate(view.features)
    }


def _is_same(view: ViewDefinition, shipped: dict[str, Column]) -> Column:
    """Return a boolean column, never null: whether the values equal the shipped values or are within tolerance."""
    parts = [F.col(ROW_HASH).eqNullSafe(shipped[ROW_HASH])]
    for feature in view.tolerant_features:
        tolerance = feature.tolerance or 0.0
        new = F.col(feature.name)
        old = shipped[feature.name]
        if feature.type.startswith("float"):
            new = new.cast("double")
            old = old.cast("double")
        # The difference is null if an integer overflows, and NaN between infinities: neither is within a tolerance.
        near = F.try_subtract(new, old).between(-tolerance, tolerance)
        parts.append(new.eqNullSafe(old) | F.coalesce(near, F.lit(False)))
    return reduce(and_, parts)
