"""Apply an entry's low watermark on a node: decide which rows have an age of their own, and update the view's record.

The low watermark of an export is an event time. The source has reached it for every row, except for the rows with an
earlier event time in their own entry. A node judges the age of these rows only by their own event time: they have an
age of their own. A node judges the age of all other published rows by the low watermark. So a row neither expires nor
looks old as long as its source confirms it at each export, although the row is shipped only once.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shoal.engine.base.times import to_micros
from shoal.engine.format.catalog import LowWatermark, Origin
from shoal.engine.root.manifest import EVENT_TIMESTAMP, Manifest


def rows_with_own_age(manifest: Manifest, batch: pa.RecordBatch) -> npt.NDArray[np.bool_] | None:
    """Return for each row of an entry whether its age counts only from its own event time: bool[rows].

    Return None if the log has no low watermark yet. In that case, the age of every row counts from its own event time.
    """
    if manifest.low_watermark is None:
        return None
    if manifest.stream is not None:
        return np.ones(batch.num_rows, np.bool_)
    event_time = batch.column(EVENT_TIMESTAMP).cast(pa.int64()).to_numpy()
    own: npt.NDArray[np.bool_] = event_time < to_micros(manifest.low_watermark)
    return own


def low_watermark_at(manifest: Manifest, before: LowWatermark | None) -> LowWatermark | None:
    """Return the low watermark of a view once an entry is applied; `before` is the view's low watermark until then."""
    if manifest.low_watermark is None:
        return None
    if before is not None and before.at == manifest.low_watermark:
        return before
    return LowWatermark(at=manifest.low_watermark, set_by=Origin(kind=manifest.kind, seq=manifest.seq, id=manifest.id))
