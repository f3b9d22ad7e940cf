"""Decide which rows of a view survive although the published base does not contain them: pushed rows and removed keys.

Pushed rows survive when the view moves to another base. Removed keys are remembered when the view moves to another
base, or when it is folded.

A tombstone remembers a removed key, for the time that `shoal.engine.base.removal_memory.removals_kept` returns. If an
older row of the key is pushed during that time, the row is left out. The tombstones of pushed deletions also hide
published rows. The tombstones of keys that the log removed are remembered only if rows were ever pushed to the view.
These tombstones hide no published rows, because replicas that applied other entries of the log must serve the same
published rows.
"""

from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt

from shoal.engine.base.errors import StoreDamaged, StoreUnreadable
from shoal.engine.base.removal_memory import removals_kept
from shoal.engine.base.times import FURTHEST_AHEAD, time_before, to_micros
from shoal.engine.format.layout import PUSHED, ROW_PRESENCE, ROW_SECOND_HASH, TOMBSTONE
from shoal.engine.format.schema import ViewSchema
from shoal.engine.kernels import finding
from shoal.engine.kernels.compiling import kernel
from shoal.engine.kernels.gathering import NO_EVENT_TIME, event_time_of
from shoal.engine.kernels.memory import load_i64, load_u8
from shoal.engine.store.open_version import read_generation
from shoal.engine.store.segment import Segment, chunk_table
from shoal.engine.store.version import ViewVersion
from shoal.loaders.commit.store_writer import NewOverlay, StoreWriter, seal_overlay
from shoal.loaders.segments.generation import CHUNK_BYTES, is_fold
from shoal.loaders.segments.merge import Fate, Fates, Merge

_NO_ROW = int(NO_EVENT_TIME)
_LEFT_OUT = int(Fate.LEFT_OUT)
_KEPT = int(Fate.KEPT)
_BURIED = int(Fate.BURIED)
_MICROSECOND = timedelta(microseconds=1)
_Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Ahead:
    """The rows of a view's base that would stay above a new base, decided before the view's lock is taken.

    The decision reads the whole base. For a large base this takes seconds. While the lock is held, no push can be
    applied.
    """

    base_id: str
    removals: bool
    segments: tuple[Segment, ...]


def decided_ahead(version: ViewVersion | None, base: Segment, schema: ViewSchema, *, removals: bool) -> Ahead | None:
    """Decide which rows of a view's current base stay. Return None if there is nothing to decide now. The arguments are
    as in `retained`."""
    if version is None or not _is_whole(version) or not (removals or version.record.base.pushed):
        return None
    alone = ViewVersion(version.record, version.segments[-1:], version.transaction)
    stays = retained(alone, base, schema, removals=removals)
    return Ahead(version.record.base.id, removals, (stays.segment(),) if stays else ())


def retained(
    version: ViewVersion | None,
    base: Segment,
    schema: ViewSchema,
    *,
    removals: bool = False,
    ahead: Ahead | None = None,
) -> NewOverlay | None:
    """Return the rows of a view that stay when `base` replaces all its segments; None if no row stays.

    A pushed row stays if the base has no row of its key, or only an older row. The pushed row does not stay if its age
    exceeds the view's time to live. A pushed tombstone stays if it hides an older row of the base. If the base has no
    row of its key, the tombstone stays unless it is too old. If the join keys changed, nothing stays, because the old
    rows have other keys.

    Args:
        removals: whether to remember the keys that are missing from the new base, because the view moves forward in its
            log.
        ahead: the earlier decision about the view's base; it counts only if the view still has this base.
    """
    if version is None or version.record.view_schema.join_keys != schema.join_keys:
        return None
    segments = list(version.segments)
    if ahead and _is_whole(version) and (ahead.base_id, ahead.removals) == (version.record.base.id, removals):
        segments[-1:] = ahead.segments
    with_pushes = [number for number, segment in enumerate(segments) if segment.record.pushed]
    if not removals:
        # Skip all segments that are older than the oldest segment with pushed rows: an older segment never affects the
        # rows of a newer segment.
        segments = segments[: with_pushes[-1] + 1] if with_pushes else []
    if not segments:
        return None
    chunks, starts = chunk_table([base])
    oldest_row = _NO_ROW if schema.ttl is None else time_before(_now(), schema.ttl // _MICROSECOND)
    window = _window(schema, removals=removals)

    def fates(first: _Int64s, address: _Int64s) -> npt.NDArray[np.uint8]:
        fate = np.empty(first.size, np.uint8)
        decide_over_base(address, _found(first, address, chunks, starts), oldest_row, *window, fate)
        return fate

    merge = Merge(segments, schema, fates=fates)
    builders = list(merge.chunks(CHUNK_BYTES))
    if not builders:
        return None
    return seal_overlay(
        schema,
        builders,
        merge.origins,
        first_seq=base.record.last_seq,
        last_seq=base.record.last_seq,
        last_entry=base.record.last_entry,
        watermark=version.record.watermark,
    )


def _is_whole(version: ViewVersion) -> bool:
    """Return whether all segments of a view can be read. If so, the last segment is the view's base."""
    return len(version.segments) == 1 + len(version.record.overlays)


def fates_in_fold(writer: StoreWriter, version: ViewVersion) -> Fates:
    """Return the function that decides which rows a fold keeps: all except tombstones that need not be remembered.

    A pushed tombstone that is too old stays while a snapshot on this node has a row of its key, because the next
    snapshot is likely to have that row too. If the view has a time to live, the tombstone is removed, because the row
    would be too old to be served.
    """
    schema = version.record.view_schema
    window = _window(schema, removals=writer.is_pushed_to(version.name))
    # The function below holds these snapshots as long as it uses the addresses of their rows.
    snapshots = _snapshots(writer, version) if schema.ttl is None else []
    chunks, starts = chunk_table(snapshots)

    def fates(first: _Int64s, address: _Int64s) -> npt.NDArray[np.uint8]:
        fate = np.empty(first.size, np.uint8)
        old = np.empty(first.size, np.bool_)
        decide_in_fold(address, *window, fate, old)
        if snapshots and old.any():
            in_snapshot = _found(first[old], address[old], chunks, starts) != finding.NOT_FOUND
            fate[old] = np.where(in_snapshot, _KEPT, _LEFT_OUT).astype(np.uint8)
        return fate

    return fates


def _window(schema: ViewSchema, *, removals: bool) -> tuple[int, int]:
    """Return two limits in microseconds: the oldest event time of a removal to remember, and the newest event time of a
    removal by the log to remember."""
    now = _now()
    latest = now + FURTHEST_AHEAD // _MICROSECOND if removals else _NO_ROW
    return time_before(now, removals_kept(schema.ttl) // _MICROSECOND), latest


def _snapshots(writer: StoreWriter, version: ViewVersion) -> list[Segment]:
    """Return the readable snapshots of a view on this node."""
    record = version.record
    snapshots = [] if is_fold(record.base.id) else [version.segments[-1]]
    for kept in record.kept:
        with suppress(StoreDamaged, StoreUnreadable):
            snapshots.append(read_generation(writer.store, kept))
    return snapshots


def _found(first: _Int64s, address: _Int64s, chunks: _Int64s, starts: _Int64s) -> _Int64s:
    """Return the address of each key's row in other segments. `first` and `address` are the first hash and the address
    of one row of each key."""
    second = np.empty_like(first)
    found = np.empty_like(first)
    chunk = np.empty_like(first)
    second_hashes(address, second)
    finding.find(first, second, chunks, starts, found, chunk)
    return found


def _now() -> int:
    return to_micros(datetime.now(UTC))


@kernel
def second_hashes(address: Any, second: Any) -> None:
    """Write the second hash of the row at each address."""
    for row in range(address.size):
        second[row] = load_i64(address[row] + ROW_SECOND_HASH)


@kernel
def decide_over_base(address: Any, in_base: Any, oldest_row: int, oldest: int, latest: int, fate: Any) -> None:
    """Write the Fate of rows that a new base replaces.

    Args:
        address: int64[rows], the address of each row.
        in_base: int64[rows], the address of the base's row of the same key (NOT_FOUND if there is none).
        oldest_row: the minimum event time, in microseconds, of a pushed row that stays.
        oldest: the minimum event time, in microseconds, of a tombstone that remembers a removed key.
        latest: the maximum event time, in microseconds, to remember a key that the log removed.
        fate: uint8[rows], receives the Fate of each row.
    """
    for row in range(address.size):
        state = load_u8(address[row] + ROW_PRESENCE)
        event_time = event_time_of(address[row])
        base_has_key = in_base[row] != finding.NOT_FOUND
        if not state & PUSHED:
            is_removed = not base_has_key and oldest <= event_time <= latest
            fate[row] = _LEFT_OUT if not is_removed else _KEPT if state & TOMBSTONE else _BURIED
            continue
        is_newer = not base_has_key or event_time > event_time_of(in_base[row])
        base_has_row = base_has_key and not load_u8(in_base[row] + ROW_PRESENCE) & TOMBSTONE
        limit = oldest if state & TOMBSTONE and not base_has_row else oldest_row
        fate[row] = _KEPT if is_newer and event_time >= limit else _LEFT_OUT


@kernel
def decide_in_fold(address: Any, oldest: int, latest: int, fate: Any, old: Any) -> None:
    """Write the Fate of the newest rows of a folded view, and mark the pushed tombstones that are too old.

    Args:
        address: int64[rows], the address of each row.
        oldest, latest: as for `decide_over_base`.
        fate: uint8[rows], receives the Fate of each row.
        old: bool[rows], receives whether each row is a pushed tombstone that is too old. Such a tombstone is left out
            unless a snapshot has a row of its key.
    """
    for row in range(address.size):
        state = load_u8(address[row] + ROW_PRESENCE)
        event_time = event_time_of(address[row])
        old[row] = state & TOMBSTONE and state & PUSHED and event_time < oldest
        is_remembered = event_time >= oldest and (state & PUSHED or event_time <= latest)
        fate[row] = _KEPT if not state & TOMBSTONE or is_remembered else _LEFT_OUT
