"""What one export of one view did."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from spark_export.guard import Loss


@dataclass(frozen=True)
class Report:
    """What one export of one view did.

    `kind` is None if nothing had to be published; `seq` is then the view's newest. `reason` says why a snapshot, or a
    delta without rows, was published. Of the `rows_read`, `duplicates` lost to a newer row of their key; every other
    row is one of `new`, `changed`, `refreshed` (shipped again before its TTL expires), `late` (changed, but older than
    what was shipped: not shipped) or `unchanged`. `removed` keys are no longer in the source. A snapshot is compared
    with nothing row by row: all its rows are `new`. `bytes` counts the published files, `seconds` the whole run.

    `refused` lists the losses over the view's limit; if there are any, nothing was published, and the other counts say
    what would have been. For a refused snapshot, the counts only say by how many rows the view would have grown (`new`)
    or shrunk (`removed`). `not_compared` names what was published without being compared with what the view had, `rows`
    or
    `values`, because no earlier entry says how many there were.
    """

    view: str
    seq: int
    kind: Literal["snapshot", "delta"] | None
    reason: str | None
    rows_read: int
    duplicates: int
    new: int
    changed: int
    refreshed: int
    removed: int
    late: int
    unchanged: int
    bytes: int
    seconds: float
    refused: tuple[Loss, ...] = ()
    not_compared: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        return asdict(self)
