"""Tell where a row comes from: every row of a key that the store still holds, newest first, and what wrote it.

For people at a terminal: it goes segment by segment, and is not made for speed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from engine.catalog import Origin
from engine.errors import LOAD_AGAIN, StoreDamaged
from engine.kernels import finding, gathering
from engine.key_columns import Entities, Hashes, KeyColumns
from engine.layout import OWN_AGE, PUSHED, ROW_EVENT_TIME, ROW_PRESENCE, TOMBSTONE, is_own_age
from engine.lookup import find_rows, read_columns
from engine.reading import read_generation
from engine.segment import Chunk, Segment
from engine.times import to_datetime
from engine.version import StoreVersion, ViewVersion


@dataclass(frozen=True)
class StoredRow:
    """One row of a key: the log's entry that wrote it, None if it was pushed; where it lies; and its values, None for a
    tombstone. `place` is "overlay", "base", or "kept" for a generation that is only there for going back. The age of a
    row counts from its own event time alone if `own_age`, and otherwise from the view's low watermark if that is newer.
    """

    origin: Origin | None
    place: str
    segment: str
    event_time: datetime
    own_age: bool
    values: Mapping[str, Any] | None


def explain(store: Path, version: StoreVersion, view: str, entities: Entities) -> list[list[StoredRow]]:
    """For each key, its rows in a view from the newest to the oldest; the first is the one that lookups see.

    Overlays that were merged hold only the newest of their rows; kept generations are looked into as well.

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
    """Add the rows that the only segment of a view has."""
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
    number, origins = chunk.origin_of(row), segment.record.origins
    if number >= len(origins):
        raise StoreDamaged(f"{chunk.origin} has a row of origin {number}, its segment has {len(origins)}; {LOAD_AGAIN}")
    return origins[number]


def _values(view: ViewVersion, hashes: Hashes) -> dict[str, list[Any]]:
    names = tuple(feature.name for feature in view.record.view_schema.features)
    columns = read_columns(view, names, hashes, oldest=gathering.NO_EVENT_TIME, stale="serve").columns
    return {name: column.to_pylist(shortest=True) for name, column in zip(names, columns, strict=True)}
