"""Count the keys of a view that have a row. The result is exact. The row counts of segments are not exact, because they
count a key once per segment.

Counting reads all overlays. This is slow, so only commands count keys. `shoal.loaders.apply.compaction` keeps the
overlays smaller than the base.
"""

import numpy as np
import numpy.typing as npt

from shoal.engine.format.layout import ROW_PRESENCE, TOMBSTONE
from shoal.engine.kernels import finding
from shoal.engine.lookup.columns import find_rows
from shoal.engine.lookup.key_columns import take_keys
from shoal.engine.store.segment import Chunk
from shoal.engine.store.version import ViewVersion


def live_keys(view: ViewVersion) -> int | None:
    """Return the number of keys whose newest row is not a tombstone. Rows of any age count, even rows that are older
    than the view's TTL. Return None if the view's rows are in a table."""
    if view.is_remote:
        return None
    *overlays, base = view.segments
    changed = [chunk for overlay in overlays for chunk in overlay.chunks]
    if not changed:
        return base.record.rows
    hashes = np.concatenate([_hashes(chunk) for chunk in changed], axis=1)
    is_live = np.concatenate([_is_live(chunk, np.arange(chunk.header.rows)) for chunk in changed])
    # Segments are read newest first, and the sort is stable, so the newest row of equal keys comes first.
    order = np.lexsort((hashes[1], hashes[0]))
    hashes = take_keys(hashes, order)
    is_live = is_live[order]
    is_newest = np.concatenate([[True], (hashes[:, 1:] != hashes[:, :-1]).any(axis=0)])
    in_base = _live_in_base(view.over([base]), take_keys(hashes, np.flatnonzero(is_newest)))
    return base.record.rows - in_base + int(np.count_nonzero(is_live[is_newest]))


def _live_in_base(base: ViewVersion, hashes: npt.NDArray[np.int64]) -> int:
    """Return how many of the keys have a row in the base."""
    found = find_rows(base, hashes)
    (segment,), is_found, live = base.segments, found.address != finding.NOT_FOUND, 0
    for number in np.unique(found.chunk[is_found]).tolist():
        chunk = segment.chunks[number]
        addresses = found.address[is_found & (found.chunk == number)]
        rows = (addresses - chunk.address - chunk.header.row_data) // chunk.header.stride
        live += int(np.count_nonzero(_is_live(chunk, rows)))
    return live


def _hashes(chunk: Chunk) -> npt.NDArray[np.int64]:
    return np.stack([chunk.hashes, chunk.rows[:, :8].copy().view(np.int64)[:, 0]])


def _is_live(chunk: Chunk, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    live: npt.NDArray[np.bool_] = (chunk.rows[rows, ROW_PRESENCE] & TOMBSTONE) == 0
    return live
