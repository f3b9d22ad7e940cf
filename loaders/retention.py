"""What is remembered of a view beside what is published: pushed rows, when the view moves to another base, and keys
that were removed, when it moves or is folded.

A key that was removed is remembered by a tombstone, for `engine.removals.removals_kept`: a row that is pushed later and
is older stays out. Those of pushed deletions hide published rows as well. Those of keys that the log removed, which are
remembered once rows were pushed to the view, hide none: replicas that took other ways along the log agree on what it
says.
"""

from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import StoreDamaged, StoreUnreadable
from engine.kernels import finding
from engine.kernels.compiling import kernel
from engine.kernels.gathering import NO_EVENT_TIME, event_time_of
from engine.kernels.memory import load_i64, load_u8
from engine.layout import PUSHED, ROW_PRESENCE, ROW_SECOND_HASH, TOMBSTONE
from engine.reading import read_generation
from engine.removals import removals_kept
from engine.schema import ViewSchema
from engine.segment import Segment, chunk_table
from engine.times import FURTHEST_AHEAD, time_before, to_micros
from engine.version import ViewVersion
from loaders.generation import CHUNK_BYTES, is_fold
from loaders.merge import Fate, Fates, Merge
from loaders.store_writer import NewOverlay, StoreWriter, seal_overlay

_NO_ROW = int(NO_EVENT_TIME)
_LEFT_OUT, _KEPT, _BURIED = int(Fate.LEFT_OUT), int(Fate.KEPT), int(Fate.BURIED)
_MICROSECOND = timedelta(microseconds=1)
_Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Ahead:
    """Rows of a view's base that would stay over a new base, decided before the view's lock is taken: going through a
    large base takes seconds, in which no push could be applied."""

    base_id: str
    removals: bool
    segments: tuple[Segment, ...]


def decided_ahead(version: ViewVersion | None, base: Segment, schema: ViewSchema, *, removals: bool) -> Ahead | None:
    """Decide about the rows of a view's own base; the arguments are those of `retained`."""
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
    """What stays of a view when `base` takes the place of all that it has; None if nothing does.

    A pushed row stays if it is newer than the base's row of its key, or the base has none, unless it has outlived the
    view's time to live. A pushed tombstone stays if it hides an older row of the base, or the base has none and it is
    not too old. Where the join keys changed nothing stays: such rows are of other keys.

    Args:
        removals: whether the view moves on along a log, and keys that the base no longer has are to be remembered.
        ahead: what was decided about the view's base, if it has the same base still.
    """
    if version is None or version.record.view_schema.join_keys != schema.join_keys:
        return None
    segments = list(version.segments)
    if ahead and _is_whole(version) and (ahead.base_id, ahead.removals) == (version.record.base.id, removals):
        segments[-1:] = ahead.segments
    with_pushes = [number for number, segment in enumerate(segments) if segment.record.pushed]
    if not removals:
        # An older segment decides nothing about the rows of newer ones.
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
    """Whether all of a view can be read, so that its last segment is its base."""
    return len(version.segments) == 1 + len(version.record.overlays)


def fates_in_fold(writer: StoreWriter, version: ViewVersion) -> Fates:
    """Which rows a fold of a view takes over: all but the tombstones that need not be remembered.

    A pushed tombstone that is too old stays while a snapshot on this node has a row of its key: the next snapshot is
    likely to have that row, too. Where rows have a time to live it would not be served.
    """
    schema = version.record.view_schema
    window = _window(schema, removals=writer.is_pushed_to(version.name))
    # Held as long as the addresses of their rows, by the function below.
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
    """Return the oldest event time of a remembered removal, and the newest for removals by the log, in microseconds."""
    now = _now()
    latest = now + FURTHEST_AHEAD // _MICROSECOND if removals else _NO_ROW
    return time_before(now, removals_kept(schema.ttl) // _MICROSECOND), latest


def _snapshots(writer: StoreWriter, version: ViewVersion) -> list[Segment]:
    """The snapshots of a view that this node has, and can read."""
    record = version.record
    snapshots = [] if is_fold(record.base.id) else [version.segments[-1]]
    for kept in record.kept:
        with suppress(StoreDamaged, StoreUnreadable):
            snapshots.append(read_generation(writer.store, kept))
    return snapshots


def _found(first: _Int64s, address: _Int64s, chunks: _Int64s, starts: _Int64s) -> _Int64s:
    """The address of the row of each key in other segments, by its first hash and the address of one of its rows."""
    second, found, chunk = np.empty_like(first), np.empty_like(first), np.empty_like(first)
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
        address, in_base: int64[rows], of each row, and of the base's row of its key (NOT_FOUND if there is none).
        oldest_row: the least event time, in microseconds, with which a pushed row stays.
        oldest: the same of what remembers a removed key.
        latest: the greatest event time with which a key that the log removed is remembered.
        fate: uint8[rows], becomes the Fate of each.
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
    """Write the Fate of the newest rows of a view that is folded, and mark the pushed tombstones that are too old.

    Args:
        address: int64[rows], of each row.
        oldest, latest: as for `decide_over_base`.
        fate: uint8[rows], becomes the Fate of each.
        old: bool[rows], becomes whether each is a pushed tombstone that is too old, and so left out unless
            a snapshot has a row of its key.
    """
    for row in range(address.size):
        state = load_u8(address[row] + ROW_PRESENCE)
        event_time = event_time_of(address[row])
        old[row] = state & TOMBSTONE and state & PUSHED and event_time < oldest
        is_remembered = event_time >= oldest and (state & PUSHED or event_time <= latest)
        fate[row] = _KEPT if not state & TOMBSTONE or is_remembered else _LEFT_OUT
