"""What one export of one view did."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from shoal.spark_export.changes.guard import Loss


@dataclass(frozen=True)
class Report:
    """The result of one export of one view.

    `kind` is None if there was nothing to publish; `seq` is then the view's newest entry. `reason` says why a snapshot,
    or a delta without rows, was published.

    `rows_read` is the number of rows in the source. `duplicates` counts the rows that were skipped because their key
    has a newer row. Every other row is one of `new`, `changed`, `refreshed` (shipped again before its TTL expires),
    `late` (changed, but not shipped because it is older than the shipped row) or `unchanged`. `removed` counts the keys
    that are no longer in the source. The rows of a snapshot are not compared with earlier rows: all of them are `new`.
    `bytes` is the size of the published files, `seconds` the duration of the whole run.

    `refused` lists the losses over the view's limit. If there are any, nothing was published, and the other counts
    describe the refused entry. For a refused snapshot, the counts only say by how many rows the view would have grown
    (`new`) or shrunk (`removed`). `not_compared` contains `rows` or `values` if their number was published without a
    comparison, because no earlier entry says how many there were.
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
        """Return the report as a dict that JSON can represent."""
        return asdict(self)
