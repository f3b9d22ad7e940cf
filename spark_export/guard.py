"""Whether an export may publish: an export must not take away more of a view than the view's limit allows.

A source that became empty, lost a partition or was joined wrongly looks like one whose rows were removed on purpose;
only the share tells them apart. This module compares numbers and reads manifests; it knows neither Spark nor rows.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from engine.errors import ManifestInvalid, NotPublished
from engine.export_root import ExportRoot
from engine.manifest import Manifest

DEFAULT_MAX_REMOVED = 0.2
"""The share that a view without `max_removed` may lose."""
SMALL = 1000
"""A view without `max_removed` that has fewer rows (a feature: fewer values) may lose any of them, but not all."""
SPARSE = 0.1
"""A feature that fewer than `SMALL` rows, and less than this share of the rows, have is not judged: it may come and go,
as the gusts of wind at three of all airports do."""


@dataclass(frozen=True)
class Numbers:
    """How many rows there are, and how many of them have a value, by feature; `values` is None if nobody counted."""

    rows: int
    values: Mapping[str, int] | None


@dataclass(frozen=True)
class Loss:
    """A loss over the limit: of a view's rows (`feature` is None), or of the values of one feature.

    `share` is lost / had. `limit` is the share that may be lost; None: any, but not all.
    """

    feature: str | None
    had: int
    lost: int
    share: float
    limit: float | None

    def __str__(self) -> str:
        limit = "not all may be" if self.limit is None else f"at most {_percent(self.limit)} may be"
        share = f"({_percent(self.share)}; {limit})"
        if self.feature is None:
            return f"{self.lost:,} of {self.had:,} rows would be removed {share}"
        return f"{self.lost:,} of {self.had:,} values of feature {self.feature!r} would be lost {share}"


@dataclass(frozen=True)
class Comparison:
    """The losses over the limit, which of `rows` and `values` could not be compared, and by how many rows the view
    would grow; None if not known."""

    losses: tuple[Loss, ...] = ()
    not_compared: tuple[str, ...] = ()
    growth: int | None = field(default=None, compare=False)


def compare(before: Numbers | None, after: Numbers, removed: Numbers | None, max_removed: float | None) -> Comparison:
    """Compare what a view had with what it would have.

    Args:
        before: what the view has; None if that is not known.
        after: what the view would have.
        removed: the rows that would be removed, and their values. Other rows may be new, so that this is not the
            difference of the two. None if it is not known: then the difference counts, and the removed rows are taken
            to have had values like all others.
        max_removed: the view's own limit, a share; None for the default one.
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
    """Return what a view has by its log, whose newest entry is given; None if the log does not say.

    Deltas of a stream and entries of format 1 do not say it. Behind the last entry that does, each tombstone may have
    removed a row, and each row and tombstone a value: the numbers are the least that the view can have, so that an
    export is never refused for a loss that it does not cause.
    """
    tombstones, changes, entry = 0, 0, newest
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
    """The loss, if it is over the limit. `all_of_them`: how many would be lost if nothing stayed."""
    if lost <= 0:
        return None
    share = lost / had
    if max_removed is None and had < SMALL:
        return Loss(feature, had, lost, share, None) if lost >= all_of_them else None
    limit = DEFAULT_MAX_REMOVED if max_removed is None else max_removed
    # Both are the double that is nearest to the same fraction where they are equal, so a limit itself is allowed.
    return Loss(feature, had, lost, share, limit) if share > limit else None


def _percent(share: float) -> str:
    return f"{100 * share:.4g}%"
