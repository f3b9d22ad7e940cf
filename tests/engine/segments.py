"""Segments in memory, of rows under any hashes one likes: real chunks, made by the loaders' own encoder."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from engine.catalog import Origin, SegmentRecord, StoreRecord, ViewRecord
from engine.keys import KEY_HASH, KEY_HASH_2
from engine.layout import RowLayout
from engine.manifest import EVENT_TIMESTAMP, TOMBSTONE
from engine.schema import ViewSchema
from engine.segment import Chunk, Segment
from engine.version import StoreVersion, ViewVersion
from loaders.arrow_rows import encode, published_schema
from loaders.segment_writer import ChunkBuilder
from tests.stores import NOW, TIMESTAMP, Row

Identity = tuple[int, int]
"""A row's two hashes."""


def batch(view: ViewSchema, rows: Mapping[Identity, Row | None]) -> pa.RecordBatch:
    """Rows as an exporter writes them, in the order of their hashes; None is a tombstone."""
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
    """One chunk of all rows, as it is stored."""
    builder = ChunkBuilder(RowLayout(view), len(rows), with_origins=False)
    encode(builder, 0, batch(view, rows))
    return builder.finish()


def segment(
    view: ViewSchema, rows: Mapping[Identity, Row | None], *, cuts: Iterable[int] = (), seq: int = 1
) -> Segment:
    """A segment; `cuts` are first hashes at which a new chunk begins."""
    bounds = sorted(cuts)
    parts: dict[int, dict[Identity, Row | None]] = {}
    for identity in sorted(rows):
        parts.setdefault(sum(bound <= identity[0] for bound in bounds), {})[identity] = rows[identity]
    chunks = [Chunk(sealed(view, part).data, f"chunk {number}") for number, part in enumerate(parts.values())]
    return Segment(record(view, rows.values(), chunks, seq), chunks)


def record(view: ViewSchema, rows: Iterable[Row | None], chunks: Sequence[Chunk], seq: int) -> SegmentRecord:
    """What the catalog would say of a segment."""
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
    """A version of a store whose only view has these segments, newest first, under its newest schema."""
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
    # Its chunks lie in this process's own memory: there is no transaction that could end.
    nothing: Any = None
    at_version = ViewVersion(view_record, segments, nothing)
    return StoreVersion(
        id=1, live=nothing, store=StoreRecord(), views={view.name: at_version}, services={}, troubles={}
    )
