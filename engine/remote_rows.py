"""Rows that are kept elsewhere, as a lookup takes them: they are fetched before it, and it waits for nothing.

How they are fetched is the tier's own business (`engine.dynamodb.tier`); this module is all that a lookup knows of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from engine.errors import LookupInvalid, RowsUnavailable
from engine.kernels.gathering import Status
from engine.segment import Segment
from engine.version import ViewVersion

Partial = Literal["serve", "fail"]
"""What becomes of a lookup of which rows did not come in time: the others are served, or it fails."""

_PARTIAL = get_args(Partial)


@dataclass(frozen=True)
class FetchedRows:
    """What came of a view's rows for the keys of one request: `unavailable`, bool[keys], has those that did not come in
    time; it is None if all did."""

    segments: Sequence[Segment]
    unavailable: npt.NDArray[np.bool_] | None = None


Fetched = Mapping[str, FetchedRows]
"""What was fetched for a request, by view."""

NOTHING: Fetched = {}


def check_partial(partial: Partial) -> None:
    """Raises LookupInvalid if `partial` is none of the things that can become of a lookup."""
    if partial not in _PARTIAL:
        raise LookupInvalid(f"partial is {partial!r}; it is one of {', '.join(_PARTIAL)}")


def with_rows(
    view: ViewVersion, fetched: Fetched | None, keys: int
) -> tuple[ViewVersion, npt.NDArray[np.bool_] | None]:
    """A view that is kept elsewhere with the rows that were fetched, and which keys' rows were not."""
    rows = fetched.get(view.name) if fetched else None
    if rows is None or (rows.unavailable is not None and rows.unavailable.size != keys):
        return view, np.ones(keys, np.bool_)
    return (view.over(rows.segments) if rows.segments else view), rows.unavailable


def mark_unavailable(
    view: ViewVersion,
    unavailable: npt.NDArray[np.bool_],
    status: npt.NDArray[np.uint8],
    counts: npt.NDArray[np.int64],
    values_per_key: int,
    partial: Partial,
) -> None:
    """Have keys whose rows did not come say so, instead of NOT_FOUND; raises RowsUnavailable if that is to fail."""
    missing = int(np.count_nonzero(unavailable))
    if not missing:
        return
    if partial == "fail":
        raise RowsUnavailable(
            f"{missing} of {status.size} rows of view {view.name!r} did not come in time from its table "
            f"{view.record.view_schema.table_name!r}; try again, give it more time, or take partial answers"
        )
    status[unavailable] = Status.UNAVAILABLE
    counts[Status.NOT_FOUND] -= missing * values_per_key
    counts[Status.UNAVAILABLE] += missing * values_per_key
