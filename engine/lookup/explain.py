"""The history of a key: every row that the store still holds, newest first, with the log entry that wrote it.

This module is for people at a terminal. It reads segment by segment, and is not made for speed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from shoal.engine.base.errors import LOAD_AGAIN, StoreDamaged
from shoal.engine.base.times import to_datetime
from shoal.engine.format.catalog import Origin
from shoal.engine.format.layout import (
    OWN_AGE,
    PUSHED,
    ROW_EVENT_TIME,
    ROW_PRESENCE,
    TOMBSTONE,
    is_own_age,
)
from shoal.engine.kernels import finding, gathering
from shoal.engine.lookup.columns import find_rows, read_columns
from shoal.engine.lookup.key_columns import Entities, Hashes, KeyColumns
from shoal.engine.store.open_version import read_generation
from shoal.engine.store.segment import Chunk, Segment
from shoal.engine.store.version import StoreVersion, ViewVersion


@dataclass(frozen=True)
class StoredRow:
    """One row of a key.

    `origin` is the log entry that wrote the row, None if the row was pushed. `place` is "overlay", "base", or "kept"
    for a generation that is kept only for rollbacks. If `own_age` is true, the age of the row is computed only from the
    row's own event time. Otherwise, it is computed from the view's low watermark if the low watermark is newer than the
    event time. `values` is None for a tombstone.
    """

    origin: Origin | None
    place: str
    segment: str
    event_time: datetime
    own_age: bool
    values: Mapping[str, Any] | None


def explain(store: Path, version: StoreVersion, view: str, entities: Entities) -> list[list[StoredRow]]:
    """Return, for each key, its rows in a view from the newest to the oldest. Lookups see the first row.

    A merged overlay contains only the newest row of each key. Kept generations are searched too.

    Raises:
        LookupInvalid, UnknownFeature: the view or the keys do not fit the store.
    """
    current = version.view(view)
    keys = KeyColumns(entities)
    histories: list[list[StoredRow]] = [[] for _ in range(keys.count)]
    places = ["overlay"] * (len(current.segments) - 1) + ["base"]
    segments = [*zip(places, current.segments, strict=True)]
    segments += [("kept", read_generation(store, kept)) for kept in current.record.kept if not version.note_of(kept)]
    for place, segment in segments:
        _add_rows(histories, ViewVersion(current.record, (segment,), current.transaction), keys, place)
    return histories


def _add_rows(histories: list[list[StoredRow]], view: ViewVersion, keys: KeyColumns, place: str) -> None:
    """Add the rows of a view's only segment to the histories."""
    (segment,) = view.segments
    hashes = keys.hashes(view)
    found = find_rows(view, hashes)
    values = _values(view, hashes)
    for key, (address, chunk_number) in enumerate(zip(found.address.tolist(), found.chunk.tolist(), strict=True)):
        if address == finding.NOT_FOUND:
            continue
        chunk = segment.chunks[chunk_number]
        row = chunk.row_at(address)
        word = int(chunk.rows[row, ROW_EVENT_TIME : ROW_EVENT_TIME + 8].copy().view(np.int64)[0])
        own_age = is_own_age(word)
        state = int(chunk.rows[row, ROW_PRESENCE])
        histories[key].append(
            StoredRow(
                origin=None if state & PUSHED else _origin(segment, chunk, row),
                place=place,
                segment=segment.record.id,
                event_time=to_datetime(word ^ OWN_AGE if own_age else word),
                own_age=own_age or bool(state & PUSHED),
                values=None if state & TOMBSTONE else {name: column[key] for name, column in values.items()},
            )
        )


def _origin(segment: Segment, chunk: Chunk, row: int) -> Origin:
    number = chunk.origin_of(row)
    origins = segment.record.origins
    if number >= len(origins):
        raise StoreDamaged(
            f"{chunk.origin} has a row of origin {number}, but its segment has {len(origins)} origins; {LOAD_AGAIN}"
        )
    return origins[number]


def _values(view: ViewVersion, hashes: Hashes) -> dict[str, list[Any]]:
    names = tuple(feature.name for feature in view.record.view_schema.features)
    columns = read_columns(view, names, hashes, oldest=gathering.NO_EVENT_TIME, stale="serve").columns
    return {name: column.to_pylist(shortest=True) for name, column in zip(names, columns, strict=True)}
