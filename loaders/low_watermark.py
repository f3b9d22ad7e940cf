"""What the low watermark of an entry means for a node: which rows have an age of their own, and what its record says.

An export states an event time that the source of every row has reached, except of the rows that have an earlier event
time in the entry that shipped them. A node judges all other published rows by that time, so that a row which the source
confirms at each export neither expires nor looks old, though it is shipped only once.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from engine.catalog import LowWatermark, Origin
from engine.manifest import EVENT_TIMESTAMP, Manifest
from engine.times import to_micros


def rows_with_own_age(manifest: Manifest, batch: pa.RecordBatch) -> npt.NDArray[np.bool_] | None:
    """bool[rows], the rows of an entry whose age counts from their own event time alone; None if the log has no low
    watermark yet, so that all rows are judged so anyway."""
    if manifest.low_watermark is None:
        return None
    if manifest.stream is not None:
        return np.ones(batch.num_rows, np.bool_)
    event_time = batch.column(EVENT_TIMESTAMP).cast(pa.int64()).to_numpy()
    own: npt.NDArray[np.bool_] = event_time < to_micros(manifest.low_watermark)
    return own


def low_watermark_at(manifest: Manifest, before: LowWatermark | None) -> LowWatermark | None:
    """The low watermark of a view that stands at an entry, where `before` is the view's own until then."""
    if manifest.low_watermark is None:
        return None
    if before is not None and before.at == manifest.low_watermark:
        return before
    return LowWatermark(at=manifest.low_watermark, set_by=Origin(kind=manifest.kind, seq=manifest.seq, id=manifest.id))
