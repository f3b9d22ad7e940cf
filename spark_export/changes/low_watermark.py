"""The age of a source's rows: compute the low watermark of a run, and find the rows with an age of their own.

Nodes judge the age of a row by the newer of its own event time and the low watermark (see
`shoal.engine.root.manifest.Manifest`). If nodes judged a row with an earlier event time by the low watermark, the row
would look younger than it is, because the source no longer updates it. Such a row has "an age of its own": nodes judge
it only by its own event time. A row is shipped when it gets an age of its own, and when it loses it. To limit these
shipments, at most about 1% of the rows are below the low watermark. The low watermark never decreases.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from shoal.engine.base.times import time_before, to_datetime, to_micros
from shoal.engine.root.manifest import EVENT_TIMESTAMP, Manifest
from shoal.spark_export.source.instants import instant
from shoal.spark_export.views.definition import ViewDefinition

_SHARE_LEFT_BEHIND = 0.01
_ACCURACY = 10_000
"""The accuracy of the quantile: its rank is wrong by at most one row in this number of rows."""
_RUNS_REMEMBERED = 6
_INTERVALS_AHEAD = 2

_MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True)
class Ages:
    """The low watermarks around a run, in microseconds since the epoch.

    `before` is the low watermark of the entry before the run, `now` that of this run. Each is None if the format of its
    entry has no low watermark. A row with a TTL that ends before `renewed_until` is shipped again if the source has a
    newer event time for it.
    """

    before: int | None
    now: int | None
    renewed_until: int

    def own(self, event_time: Column) -> Column:
        """Return a boolean column: whether a row with this event time has an age of its own from this run on."""
        return F.lit(False) if self.now is None else event_time < instant(self.now)

    def owned_before(self, event_time: Column) -> Column:
        """Return a boolean column: whether a row with this event time had an age of its own before this run."""
        return F.lit(False) if self.before is None else event_time < instant(self.before)

    def needs_renewal(self, view: ViewDefinition, event_time: Column, shipped: Column) -> Column:
        """Return a boolean column: whether nodes judge the row by a time that expires soon, and the source has a newer
        event time."""
        if view.ttl is None:
            return F.lit(False)
        judged_by = shipped
        # The low watermark is not used in two cases: a pushed row may override the shipped row, and nodes do not apply
        # the low watermark to views in tables.
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
    """Return the low watermarks before and after a run.

    Args:
        rows: the rows of the source, as returned by `shoal.spark_export.source.rows.conform`.
        previous: the newest entry of the view; None if there is none.
        run_time: the time of the run in microseconds since the epoch.
        has_low_watermark: whether the format of the new entry has a low watermark.
        stands_still: whether the source has gone back, for some key, to an older row than the shipped one. The low
            watermark must then not rise above the event time of the older row, because nodes would judge the shipped
            row by the low watermark.
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
    """Return the times of the last exports, with this run as the last one."""
    return (*_runs_of(previous), run_time)[-_RUNS_REMEMBERED:]


def _renewed_until(view: ViewDefinition, previous: Manifest | None, run_time: int) -> int:
    """Return the time until which nodes must be able to serve unshipped rows, in microseconds since the epoch: the
    expected time of the run after the next run."""
    runs = [to_micros(moment) for moment in _runs_of(previous)] + [run_time]
    intervals = [later - earlier for earlier, later in pairwise(runs)]
    return run_time + _INTERVALS_AHEAD * max(intervals, default=0)


def _runs_of(previous: Manifest | None) -> Sequence[datetime]:
    if previous is None:
        return ()
    return previous.recent_runs or (previous.published_at,)
