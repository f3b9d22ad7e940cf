"""Decide whether an export may publish: it must not remove a larger share of a view than the view's limit allows.

If a source became empty, lost a partition or was joined wrongly, it looks as if its rows were removed on purpose. Only
the removed share distinguishes such a mistake from an intended removal. This module compares numbers and reads
manifests; it does not use Spark.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from shoal.engine.base.errors import ManifestInvalid, NotPublished
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.root.manifest import Manifest

DEFAULT_MAX_REMOVED = 0.2
"""The share of rows, or of a feature's values, that a view without `max_removed` may lose in one export."""
SMALL = 1000
"""In a view without `max_removed`, the limit does not apply if the view has fewer rows than this. It does not apply to
a feature with fewer values than this either. Any of these rows or values may be lost, but not all of them."""
SPARSE = 0.1
"""A feature is not checked if fewer than `SMALL` rows, and less than this share of the rows, have a value of it. Such
values may come and go, for example wind gusts that only three of all airports report."""


@dataclass(frozen=True)
class Numbers:
    """The number of rows of a view, and for each feature the number of rows with a value. `values` is None if the
    values were not counted."""

    rows: int
    values: Mapping[str, int] | None


@dataclass(frozen=True)
class Loss:
    """A loss over the limit: of a view's rows (`feature` is None), or of the values of one feature.

    `share` is lost / had. `limit` is the share that may be lost; None if any share below 100% may be lost.
    """

    feature: str | None
    had: int
    lost: int
    share: float
    limit: float | None

    def __str__(self) -> str:
        limit = "limit: below 100%" if self.limit is None else f"limit: {_percent(self.limit)}"
        share = f"({_percent(self.share)}; {limit})"
        if self.feature is None:
            return f"{self.lost:,} of {self.had:,} rows would be removed {share}"
        return f"{self.lost:,} of {self.had:,} values of feature {self.feature!r} would be lost {share}"


@dataclass(frozen=True)
class Comparison:
    """The losses over the limit of one export.

    `not_compared` contains `rows` or `values` if they could not be compared. `growth` is the number of rows by which
    the view would grow; None if that is not known.
    """

    losses: tuple[Loss, ...] = ()
    not_compared: tuple[str, ...] = ()
    growth: int | None = field(default=None, compare=False)


def compare(before: Numbers | None, after: Numbers, removed: Numbers | None, max_removed: float | None) -> Comparison:
    """Compare the numbers of a view before and after an export.

    Args:
        before: the numbers before the export; None if they are not known.
        after: the numbers after the export.
        removed: the numbers of the rows that the export would remove. They may exceed the difference between `before`
            and `after`, because other rows may be new. None if they are not known. In that case, the difference counts,
            and the removed rows are assumed to have values as often as all rows.
        max_removed: the view's own limit as a share; None for the default limit.
    """
    if before is None:
        return Comparison(not_compared=("rows", "values"))
    growth = after.rows - before.rows
    gone = removed.rows if removed is not None else max(0, before.rows - after.rows)
    losses = [_loss(None, before.rows, gone, before.rows, max_removed)]
    if before.values is None or after.values is None:
        return Comparison(tuple(loss for loss in losses if loss), ("values",), growth)
    for feature in before.values.keys() & after.values.keys():
        had = before.values[feature]
        if had < SMALL and had < SPARSE * before.rows:
            continue
        if removed is not None and removed.values is not None:
            explained = removed.values.get(feature, 0)
        else:
            explained = math.ceil(had * gone / before.rows) if before.rows else 0
        losses.append(_loss(feature, had, had - explained - after.values[feature], had - explained, max_removed))
    found = [loss for loss in losses if loss is not None]
    found.sort(key=lambda loss: (loss.feature is not None, -loss.share, loss.feature))
    return Comparison(tuple(found), growth=growth)


def published_numbers(root: ExportRoot, newest: Manifest) -> Numbers | None:
    """Return the numbers of a view according to its log, given the newest entry; None if the log does not contain them.

    Deltas of a stream and entries of format 1 contain no numbers. After the last entry with numbers, each tombstone may
    have removed a row, and each row or tombstone may have removed a value. The result is therefore the least number
    that the view can have. So an export is never refused for a loss that other publishers caused.
    """
    tombstones = 0
    changes = 0
    entry = newest
    while entry.live_rows is None and entry.kind != "snapshot":
        tombstones += entry.tombstones
        changes += entry.rows + entry.tombstones
        try:
            entry = root.entry(newest.view.name, entry.seq - 1)
        except (NotPublished, ManifestInvalid):
            return None
    rows = entry.rows if entry.live_rows is None else entry.live_rows
    values = None
    if entry.values is not None:
        values = {feature: max(0, count - changes) for feature, count in entry.values.items()}
    return Numbers(max(0, rows - tombstones), values)


def _loss(feature: str | None, had: int, lost: int, all_of_them: int, max_removed: float | None) -> Loss | None:
    """Return the loss if it is over the limit, otherwise None. `all_of_them` is the number of rows or values that would
    be lost if nothing remained."""
    if lost <= 0:
        return None
    share = lost / had
    if max_removed is None and had < SMALL:
        return Loss(feature, had, lost, share, None) if lost >= all_of_them else None
    limit = DEFAULT_MAX_REMOVED if max_removed is None else max_removed
    # A loss of exactly the limit is allowed: equal fractions give the same nearest double.
    return Loss(feature, had, lost, share, limit) if share > limit else None


def _percent(share: float) -> str:
    return f"{100 * share:.4g}%"
