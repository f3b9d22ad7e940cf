"""Remote rows in a lookup: rows that are in a table, not on this node. They are fetched before the lookup, so the
lookup never waits.

`shoal.engine.dynamodb.tier` fetches the rows. The code of a lookup uses only this module.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from shoal.engine.base.errors import LookupInvalid, RowsUnavailable
from shoal.engine.kernels.gathering import Status
from shoal.engine.store.segment import Segment
from shoal.engine.store.version import ViewVersion

Partial = Literal["serve", "fail"]
"""The treatment of a lookup if some rows did not arrive in time: serve the other rows, or fail."""

_PARTIAL = get_args(Partial)


@dataclass(frozen=True)
class FetchedRows:
    """The fetched rows of a view for the keys of one request. `unavailable`, bool[keys], marks the keys whose rows did
    not arrive in time; it is None if all rows arrived."""

    segments: Sequence[Segment]
    unavailable: npt.NDArray[np.bool_] | None = None


Fetched = Mapping[str, FetchedRows]
"""The fetched rows of a request, by view."""

NOTHING: Fetched = {}


def check_partial(partial: Partial) -> None:
    """Raise LookupInvalid if `partial` is not one of: serve, fail."""
    if partial not in _PARTIAL:
        raise LookupInvalid(f"partial is {partial!r}; it must be one of {', '.join(_PARTIAL)}")


def with_rows(
    view: ViewVersion, fetched: Fetched | None, keys: int
) -> tuple[ViewVersion, npt.NDArray[np.bool_] | None]:
    """Return a remote view with its fetched rows, and a mask of the keys whose rows are missing. The mask is None if no
    rows are missing."""
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
    """Set the status UNAVAILABLE for keys with missing rows; raise RowsUnavailable if `partial` is "fail"."""
    missing = int(np.count_nonzero(unavailable))
    if not missing:
        return
    if partial == "fail":
        raise RowsUnavailable(
            f"{missing} of {status.size} rows of view {view.name!r} did not arrive in time from its table "
            f"{view.record.view_schema.table_name!r}; try again, raise the timeout, or accept partial answers"
        )
    status[unavailable] = Status.UNAVAILABLE
    counts[Status.NOT_FOUND] -= missing * values_per_key
    counts[Status.UNAVAILABLE] += missing * values_per_key
