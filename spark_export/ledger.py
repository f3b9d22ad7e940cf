"""Find what changed: compare a source's rows with what was shipped before, and keep the outcome as a ledger.

A ledger has a row for each row of the source and for each key that vanished from it, with the verdict on it. It is
written once, as Parquet, and serves three ends: its counts are the report, its keys to ship make the entry, and it is
the state that the next run compares with. It holds hashes instead of values, so a run reads nothing of what earlier
ones published:

    __key_hash, __key_hash_2   bigint     the key
    __row_hash                 bigint     of the shipped values of features without a tolerance; null: the key is gone
    __event_timestamp          timestamp  as shipped
    <feature with a tolerance>            as shipped, so that small steps cannot add up unnoticed
    __values_0, …              bigint     which features have a value, as shipped, a bit each: `value_counts.py`.
                                          Of a key that this run removes: which had one
    __seen                     timestamp  the source's event time, if it is another
    __verdict                  string     a Verdict; for an unsound row, the number of the demand it breaks
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from functools import reduce
from operator import and_
from typing import Any

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from engine.keys import KEY_HASH, KEY_HASH_2
from engine.manifest import EVENT_TIMESTAMP
from engine.removals import removals_kept
from engine.times import time_before, to_datetime
from spark_export.hashes import key_hashes, row_hash
from spark_export.instants import instant
from spark_export.low_watermark import Ages
from spark_export.source import spark_type
from spark_export.value_counts import sums, word_names, words
from spark_export.views import ViewDefinition

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
    """What a run found about a row of the source, or about a key that the source no longer has."""

    NEW = "new"
    CHANGED = "changed"
    REFRESHED = "refreshed"
    """Its values stand, but nodes have to judge its age anew: it would expire too early, or gets or loses an age of its
    own (see `spark_export.low_watermark`)."""
    UNCHANGED = "unchanged"
    LATE = "late"
    """Its values differ, but its event time is older than the shipped one, which a node would go on to serve."""
    DUPLICATE = "duplicate"
    """Another row of its key has a newer event time."""
    REMOVED = "removed"
    GONE = "gone"
    """Removed by an earlier run. It is kept because a node, too, holds the key's last event time against late rows."""


SHIPPED = (Verdict.NEW, Verdict.CHANGED, Verdict.REFRESHED)


@dataclass(frozen=True)
class Tally:
    """How often each verdict was given, how many rows break which demand, and the newest event time seen.

    `live_rows` is how many rows the view has after the run, `values` how many of them have a value, by feature;
    `removed_values` is the same of the rows that the run removes. Ledgers of older versions have no bits to count:
    `values` is then None.
    """

    counts: dict[Verdict, int]
    flaws: dict[int, int]
    watermark: datetime | None
    live_rows: int
    values: dict[str, int] | None
    removed_values: dict[str, int]

    @property
    def shipped(self) -> int:
        """How many rows of the source a delta ships."""
        return sum(self.counts[verdict] for verdict in SHIPPED)

    @property
    def live_before(self) -> int:
        """How many rows the view had before the run, if it had a state to compare with."""
        return self.live_rows - self.counts[Verdict.NEW] + self.counts[Verdict.REMOVED]


def with_hashes(view: ViewDefinition, rows: DataFrame) -> DataFrame:
    """The rows, as `spark_export.source.fit` gives them, and `__key_hash`, `__key_hash_2` and `__row_hash`."""
    first, second = key_hashes(view.join_keys)
    exact = [feature for feature in view.features if feature.tolerance is None]
    return rows.withColumns({KEY_HASH: first, KEY_HASH_2: second, ROW_HASH: row_hash(exact)})


def newest_first(view: ViewDefinition, *partition: str) -> Column:
    """int: a row's rank among the rows of its key, 1 for the newest; the order is total up to equal rows."""
    ties = [F.desc(ROW_HASH), *(F.desc(feature.name) for feature in view.tolerant_features)]
    return F.row_number().over(Window.partitionBy(*partition).orderBy(F.desc(EVENT_TIMESTAMP), *ties))


def judge(view: ViewDefinition, rows: DataFrame, flaw: Column, state: DataFrame | None, ages: Ages) -> DataFrame:
    """The ledger of a run: of `rows` (see `with_hashes`) against `state` (see `shipped_before`; None: ship everything).

    `flaw` is as `spark_export.checks.flaw` makes it.
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
    is_served, event_time = shipped[ROW_HASH].isNotNull(), F.col(EVENT_TIMESTAMP)
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
    # An unchanged row has the values that were shipped, also if its state is of a version that kept no bits.
    is_as_shipped = ships | (F.col(VERDICT) == Verdict.UNCHANGED)
    for name in word_names(view):
        of_served = F.when(is_served, F.coalesce(shipped[name], F.col(name)))
        others.append(F.when(is_as_shipped, F.col(name)).otherwise(of_served).alias(name))
    seen = F.when(~ships & ~event_time.eqNullSafe(shipped[EVENT_TIMESTAMP]), event_time)
    return judged.select(*KEY, of_row_hash.alias(ROW_HASH), *others, seen.alias(SEEN), VERDICT)


def ledger_columns(view: ViewDefinition) -> str:
    """The columns of a ledger, as DDL."""
    columns = {KEY_HASH: "bigint", KEY_HASH_2: "bigint", ROW_HASH: "bigint", EVENT_TIMESTAMP: "timestamp"}
    columns |= {feature.name: spark_type(feature.type) for feature in view.tolerant_features}
    columns |= dict.fromkeys(word_names(view), "bigint")
    columns |= {SEEN: "timestamp", VERDICT: "string"}
    return ", ".join(f"`{name}` {kind}" for name, kind in columns.items())


def shipped_before(view: ViewDefinition, ledger: DataFrame, run_time: int, ages: Ages) -> DataFrame:
    """The columns of an earlier run's ledger that say what was shipped, one row for each key, and whether nodes judge
    its age by its own event time alone: null where that is not known, as the source had gone back to an older row."""
    own_age = F.when(~_went_back(), ages.owned_before(F.coalesce(SEEN, EVENT_TIMESTAMP)))
    ledger = ledger.withColumn(_OWN_AGE, own_age)
    is_remembered = F.col(EVENT_TIMESTAMP) >= instant(time_before(run_time, removals_kept(view.ttl) // _MICROSECOND))
    ledger = ledger.where(F.col(VERDICT) != Verdict.DUPLICATE)
    return ledger.where(F.col(ROW_HASH).isNotNull() | is_remembered).drop(SEEN, VERDICT)


def goes_back(ledger: DataFrame) -> bool:
    """Whether the source of an earlier run's ledger had an older row than the shipped one, for a key that is served."""
    return not ledger.where(_went_back() & F.col(ROW_HASH).isNotNull()).isEmpty()


def _went_back() -> Column:
    is_older = (F.col(SEEN) < F.col(EVENT_TIMESTAMP)) | (F.col(VERDICT) == Verdict.LATE)
    # A duplicate may well be older than the shipped row: the source has a newer one of its key.
    return F.coalesce(is_older & (F.col(VERDICT) != Verdict.DUPLICATE), F.lit(False))


def tally(view: ViewDefinition, ledger: DataFrame) -> Tally:
    """Count a ledger."""
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
    """The sums over groups that `tally` counted, which come last in each; null is of a group without bits."""
    return {
        feature.name: sum(numbers[4 + position] or 0 for numbers in groups)
        for position, feature in enumerate(view.features)
    }


def _is_same(view: ViewDefinition, shipped: dict[str, Column]) -> Column:
    """boolean, never null: the values are those that were shipped, or within tolerance of them."""
    parts = [F.col(ROW_HASH).eqNullSafe(shipped[ROW_HASH])]
    for feature in view.tolerant_features:
        tolerance = feature.tolerance or 0.0
        new, old = F.col(feature.name), shipped[feature.name]
        if feature.type.startswith("float"):
            new, old = new.cast("double"), old.cast("double")
        # Null where an integer's difference overflows, NaN between infinities: neither is within a tolerance.
        near = F.try_subtract(new, old).between(-tolerance, tolerance)
        parts.append(new.eqNullSafe(old) | F.coalesce(near, F.lit(False)))
    return reduce(and_, parts)
