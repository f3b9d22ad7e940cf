"""Find what changed: compare a source's rows with what was shipped before, and keep the outcome as a ledger.

A ledger has a row for each row of the source and for each key that vanished from it, with the verdict on it. It is
written once, as Parquet, and serves three ends: its counts are the report, its keys to ship make the entry, and it is
the state that the next run compares with. It holds hashes instead of values, so a run reads nothing of what earlier
ones published:

    __key_hash, __key_hash_2   bigint     the key
    __row_hash                 bigint     of the shipped values of features without a tolerance; null: the key is gone
    __event_timestamp          timestamp  as shipped
    <feature with a tolerance>            as shipped, so that small steps cannot add up unnoticed
    __seen                     timestamp  the source's event time, if it is another
    __verdict                  string     a Verdict; for an unsound row, the number of the demand it breaks
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from functools import reduce
from operator import and_

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from engine.keys import KEY_HASH, KEY_HASH_2
from engine.manifest import EVENT_TIMESTAMP
from engine.removals import removals_kept
from engine.times import time_before
from spark_export.hashes import key_hashes, row_hash
from spark_export.instants import from_micros, instant
from spark_export.low_watermark import Ages
from spark_export.source import spark_type
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
    """How often each verdict was given, how many rows break which demand, and the newest event time seen."""

    counts: dict[Verdict, int]
    flaws: dict[int, int]
    watermark: datetime | None

    @property
    def shipped(self) -> int:
        """How many rows of the source a delta ships."""
        return sum(self.counts[verdict] for verdict in SHIPPED)


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
    source = rows.select(*kept, flaw.alias(_FLAW)).withColumn(_RANK, newest_first(view, *KEY))
    unsound = F.when(F.col(_FLAW).isNotNull(), F.col(_FLAW).cast("string"))
    unsound = unsound.when(F.col(_RANK) > 1, Verdict.DUPLICATE)
    if state is None:
        verdict = unsound.otherwise(Verdict.NEW)
        return source.select(*kept, F.lit(None).cast("timestamp").alias(SEEN), verdict.alias(VERDICT))

    shipped = {name: F.col(_SHIPPED + name) for name in (ROW_HASH, EVENT_TIMESTAMP, *tolerant)}
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
    seen = F.when(~ships & ~event_time.eqNullSafe(shipped[EVENT_TIMESTAMP]), event_time)
    return judged.select(*KEY, of_row_hash.alias(ROW_HASH), *others, seen.alias(SEEN), VERDICT)


def ledger_columns(view: ViewDefinition) -> str:
    """The columns of a ledger, as DDL."""
    columns = {KEY_HASH: "bigint", KEY_HASH_2: "bigint", ROW_HASH: "bigint", EVENT_TIMESTAMP: "timestamp"}
    columns |= {feature.name: spark_type(feature.type) for feature in view.tolerant_features}
    columns |= {SEEN: "timestamp", VERDICT: "string"}
    return ", ".join(f"`{name}` {kind}" for name, kind in columns.items())


def shipped_before(view: ViewDefinition, ledger: DataFrame, run_time: int, ages: Ages) -> DataFrame:
    """The columns of an earlier run's ledger that say what was shipped, one row for each key, and whether nodes judge
    its age by its own event time alone: null where that is not known, as the source had gone back to an older row."""
    went_back = (F.col(SEEN) < F.col(EVENT_TIMESTAMP)) | (F.col(VERDICT) == Verdict.LATE)
    own_age = F.when(~F.coalesce(went_back, F.lit(False)), ages.owned_before(F.coalesce(SEEN, EVENT_TIMESTAMP)))
    ledger = ledger.withColumn(_OWN_AGE, own_age)
    is_remembered = F.col(EVENT_TIMESTAMP) >= instant(time_before(run_time, removals_kept(view.ttl) // _MICROSECOND))
    ledger = ledger.where(F.col(VERDICT) != Verdict.DUPLICATE)
    return ledger.where(F.col(ROW_HASH).isNotNull() | is_remembered).drop(SEEN, VERDICT)


def tally(ledger: DataFrame) -> Tally:
    """Count a ledger."""
    newest = F.unix_micros(F.max(F.coalesce(SEEN, EVENT_TIMESTAMP)))
    found = ledger.groupBy(VERDICT).agg(F.count(F.lit(1)), newest).collect()
    counts = dict.fromkeys(Verdict, 0)
    counts |= {Verdict(verdict): count for verdict, count, _ in found if not verdict.isdigit()}
    flaws = {int(flaw): count for flaw, count, _ in found if flaw.isdigit()}
    times = [micros for *_, micros in found if micros is not None]
    return Tally(counts, flaws, from_micros(max(times)) if times and not flaws else None)


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
