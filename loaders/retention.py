"""What becomes of pushed rows when a view moves to another base: those that it does not supersede are laid over it."""

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from engine.kernels import finding
from engine.kernels.gathering import NO_EVENT_TIME
from engine.kernels.memory import load_i64, load_u8
from engine.layout import PUSHED, ROW_EVENT_TIME, ROW_PRESENCE, ROW_SECOND_HASH, ROW_STATE, TOMBSTONE
from engine.schema import ViewSchema
from engine.segment import Segment, chunk_table
from engine.times import time_before
from engine.version import ViewVersion
from loaders.generation import CHUNK_BYTES
from loaders.merge import Merge
from loaders.store_writer import NewOverlay, seal_overlay

_NO_ROW = int(NO_EVENT_TIME)


def retained(version: ViewVersion | None, base: Segment, schema: ViewSchema) -> NewOverlay | None:
    """The pushed rows of a view that stay when `base` takes the place of all that it has; None if there are none.

    A pushed row stays if it is newer than the base's row of its key, or the base has none, unless it has outlived the
    view's time to live. A pushed tombstone stays if it hides an older row of the base. Where the join keys changed
    nothing stays: such rows are of other keys.
    """
    if version is None or version.record.view_schema.join_keys != schema.join_keys:
        return None
    with_pushes = [number for number, segment in enumerate(version.segments) if segment.record.pushed]
    if not with_pushes:
        return None
    # An older segment decides nothing about the rows of newer ones.
    segments = version.segments[: with_pushes[-1] + 1]
    chunks, starts = chunk_table([base])
    oldest = _NO_ROW
    if schema.ttl is not None:
        oldest = time_before(_microseconds_now(), schema.ttl // timedelta(microseconds=1))

    def outlives(first: npt.NDArray[np.int64], address: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        second = np.empty_like(first)
        second_hashes(address, second)
        in_base, chunk = np.empty_like(first), np.empty_like(first)
        finding.find(first, second, chunks, starts, in_base, chunk)
        stays = np.empty(first.size, np.bool_)
        mark_outliving(address, in_base, oldest, stays)
        return stays

    merge = Merge(segments, schema, drop_tombstones=False, only=outlives)
    builders = list(merge.chunks(CHUNK_BYTES))
    if not builders:
        return None
    return seal_overlay(
        schema,
        builders,
        (),
        first_seq=base.record.last_seq,
        last_seq=base.record.last_seq,
        last_entry=base.record.last_entry,
        watermark=version.record.watermark,
    )


def _microseconds_now() -> int:
    return int(datetime.now(UTC).timestamp() * 1_000_000)


@njit(nogil=True, cache=True)
def second_hashes(address: Any, second: Any) -> None:
    """Write the second hash of the row at each address."""
    for row in range(address.size):
        second[row] = load_i64(address[row] + ROW_SECOND_HASH)


@njit(nogil=True, cache=True)
def mark_outliving(address: Any, in_base: Any, oldest: int, stays: Any) -> None:
    """Mark the pushed rows that a base does not supersede, by the address of each and of the base's row of its key
    (NOT_FOUND if there is none); those with an event time before `oldest` (microseconds) are not marked either."""
    for row in range(address.size):
        state = load_u8(address[row] + ROW_PRESENCE)
        event_time = load_i64(address[row] + ROW_EVENT_TIME)
        stays[row] = False
        if not state & PUSHED or event_time < oldest:
            continue
        if in_base[row] == finding.NOT_FOUND or load_u8(in_base[row] + ROW_PRESENCE) & ROW_STATE == TOMBSTONE:
            stays[row] = not state & TOMBSTONE
        else:
            stays[row] = event_time > load_i64(in_base[row] + ROW_EVENT_TIME)
