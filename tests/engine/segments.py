"""Segments in memory, with rows under any chosen hashes: real chunks, made by the loaders' own encoder."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shoal.engine.format.catalog import Origin, SegmentRecord, StoreRecord, ViewRecord
from shoal.engine.format.keys import KEY_HASH, KEY_HASH_2
from shoal.engine.format.layout import RowLayout
from shoal.engine.format.schema import ViewSchema
from shoal.engine.root.manifest import EVENT_TIMESTAMP, TOMBSTONE
from shoal.engine.store.segment import Chunk, Segment
from shoal.engine.store.version import StoreVersion, ViewVersion
from shoal.loaders.segments.arrow_rows import encode, published_schema
from shoal.loaders.segments.segment_writer import ChunkBuilder
from tests.stores import NOW, TIMESTAMP, Row

Identity = tuple[int, int]
"""A row's two hashes."""


def batch(view: ViewSchema, rows: Mapping[Identity, Row | None]) -> pa.RecordBatch:
    """Return rows as an exporter writes them, in the order of their hashes. A row that is `None` becomes a
    tombstone."""
    ordered = sorted(rows)
    content = [rows[identity] or {} for identity in ordered]
    columns: dict[str, list[Any]] = {
        KEY_HASH: [first for first, _ in ordered],
        KEY_HASH_2: [second for _, second in ordered],
        EVENT_TIMESTAMP: [row.get(TIMESTAMP, NOW) for row in content],
        TOMBSTONE: [rows[identity] is None for identity in ordered],
    }
    for name in (*(key.name for key in view.join_keys), *(feature.name for feature in view.features)):
        columns[name] = [row.get(name) for row in content]
    schema = published_schema(view, delta=True)
    return pa.RecordBatch.from_pydict({name: columns[name] for name in schema.names}, schema=schema)


def sealed(view: ViewSchema, rows: Mapping[Identity, Row | None]) -> npt.NDArray[np.uint8]:
    """Return one chunk of all rows, in its stored form."""
    builder = ChunkBuilder(RowLayout(view), len(rows), with_origins=False)
    encode(builder, 0, batch(view, rows))
    return builder.finish()


def segment(
    view: ViewSchema, rows: Mapping[Identity, Row | None], *, cuts: Iterable[int] = (), seq: int = 1
) -> Segment:
    """Return a segment. A new chunk begins at each first hash in `cuts`."""
    bounds = sorted(cuts)
    parts: dict[int, dict[Identity, Row | None]] = {}
    for identity in sorted(rows):
        parts.setdefault(sum(bound <= identity[0] for bound in bounds), {})[identity] = rows[identity]
    chunks = [Chunk(sealed(view, part).data, f"chunk {number}") for number, part in enumerate(parts.values())]
    return Segment(record(view, rows.values(), chunks, seq), chunks)


def record(view: ViewSchema, rows: Iterable[Row | None], chunks: Sequence[Chunk], seq: int) -> SegmentRecord:
    """Return the catalog's record of a segment."""
    dead = [row is None for row in rows]
    return SegmentRecord(
        id=f"segment-{seq}",
        view_schema=view,
        origins=(Origin(kind="delta", seq=seq, id=f"{seq:032x}"),),
        first_seq=seq,
        last_seq=seq,
        last_entry=f"{seq:032x}",
        chunks=len(chunks),
        rows=dead.count(False),
        tombstones=dead.count(True),
        bytes=sum(chunk.header.total for chunk in chunks),
        watermark=None,
        created_at=datetime.now(UTC),
    )


def version(view: ViewSchema, segments: Sequence[Segment]) -> StoreVersion:
    """Return a version of a store with a single view, which has these segments, newest first, and its newest schema."""
    newest = segments[0].record
    view_record = ViewRecord(
        view_schema=view,
        base=segments[-1].record,
        overlays=tuple(part.record for part in segments[:-1]),
        applied_seq=newest.last_seq,
        applied_entry=newest.last_entry,
        published_at=NOW,
        applied_at=NOW,
        watermark=None,
    )
    # The chunks are in this process's own memory, so there is no transaction that could end.
    nothing: Any = None
    at_version = ViewVersion(view_record, segments, nothing)
    return StoreVersion(
        id=1, live=nothing, store=StoreRecord(), views={view.name: at_version}, services={}, troubles={}
    )
