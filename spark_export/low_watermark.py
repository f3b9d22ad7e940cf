"""How old the rows of a source are: the low watermark of a run, and which rows nodes must not judge by it.

Nodes take the newer of a row's own event time and the low watermark (see `engine.manifest.Manifest`). A row that the
source no longer updates would look younger than it is, so a row below the low watermark has an age of its own, and is
shipped when it gets one and when it loses it. To limit such shipments, at most about 1% of the rows are below the low
watermark. It never decreases.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from engine.manifest import EVENT_TIMESTAMP, Manifest
from engine.times import time_before, to_datetime, to_micros
from spark_export.instants import instant
from spark_export.views import ViewDefinition

_SHARE_LEFT_BEHIND = 0.01
_ACCURACY = 10_000
"""Of the quantile, which is off by at most one row in so many."""
_RUNS_REMEMBERED = 6
_INTERVALS_AHEAD = 2

_MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True)
class Ages:
    """What a run knows of the age of rows; times and durations in microseconds.

    `before` and `now` are the low watermark of the entry that the run continues, and of this run; None where the format
    has none. A row whose TTL ends before `renewed_until` is shipped again, if the source has a newer time for it.
    """

    before: int | None
    now: int | None
    renewed_until: int

    def own(self, event_time: Column) -> Column:
        """boolean: whether rows with an event time have an age of their own from this run on."""
        return F.lit(False) if self.now is None else event_time < instant(self.now)

    def owned_before(self, event_time: Column) -> Column:
        """boolean: the same until this run."""
        return F.lit(False) if self.before is None else event_time < instant(self.before)

    def needs_renewal(self, view: ViewDefinition, event_time: Column, shipped: Column) -> Column:
        """boolean: the source has an event time newer than the time by which nodes judge the row, and that time expires
        soon."""
        if view.ttl is None:
            return F.lit(False)
        judged_by = shipped
        # A pushed row may lie over the shipped one, and nodes do not judge views in tables by the low watermark.
        if self.now is not None and view.push_source is None and view.tier == "local":
            judged_by = F.when(self.own(event_time), shipped).otherwise(F.greatest(shipped, instant(self.now)))
        too_early = instant(time_before(self.renewed_until, view.ttl // _MICROSECOND))
        return (event_time > judged_by) & (judged_by < too_early)

    @property
    def low_watermark(self) -> datetime | None:
        """The low watermark of this run."""
        return to_datetime(self.now) if self.now is not None else None


def ages(
    view: ViewDefinition,
    rows: DataFrame,
    previous: Manifest | None,
    run_time: int,
    *,
    has_low_watermark: bool,
    stands_still: bool,
) -> Ages:
    """Read what a run has to know of the age of its source's rows, which are as `spark_export.source.fit` gives them.

    Args:
        run_time: microseconds since the epoch.
        has_low_watermark: whether the format in which the run publishes has one.
        stands_still: whether the source has gone back, for some key, to an older row than the shipped one. The low
            watermark must not rise over that row, whose age nodes would take for that of the shipped one.
    """
    before = to_micros(previous.low_watermark) if previous and previous.low_watermark else None
    if not has_low_watermark:
        return Ages(before, None, _renewed_until(view, previous, run_time))
    reached: int | None = None
    if view.timestamp_field is None:
        reached = run_time
    elif before is None or not stands_still:
        time = F.unix_micros(EVENT_TIMESTAMP)
        (found,) = rows.agg(F.percentile_approx(time, _SHARE_LEFT_BEHIND, _ACCURACY)).collect()
        reached = min(found[0], run_time) if found[0] is not None else None
    seen = [moment for moment in (before, reached) if moment is not None]
    return Ages(before, max(seen, default=None), _renewed_until(view, previous, run_time))


def recent_runs(previous: Manifest | None, run_time: datetime) -> tuple[datetime, ...]:
    """When the last exports ran, this one last."""
    return (*_runs_of(previous), run_time)[-_RUNS_REMEMBERED:]


def _renewed_until(view: ViewDefinition, previous: Manifest | None, run_time: int) -> int:
    """Return the time until which nodes must be able to serve the unshipped rows: the run after the next."""
    runs = [to_micros(moment) for moment in _runs_of(previous)] + [run_time]
    intervals = [later - earlier for earlier, later in pairwise(runs)]
    return run_time + _INTERVALS_AHEAD * max(intervals, default=0)


def _runs_of(previous: Manifest | None) -> Sequence[datetime]:
    if previous is None:
        return ()
    return previous.recent_runs or (previous.published_at,)
