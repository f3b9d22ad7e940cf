"""Export roots and stores for tests without Spark: real files, published and loaded by the real code."""

import itertools
import os
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from shoal.engine.format.keys import KEY_HASH, KEY_HASH_2
from shoal.engine.format.schema import ViewSchema, arrow_type
from shoal.engine.kernels.hashing import key_hashes
from shoal.engine.root.export_root import MANIFEST, ExportRoot, file_checksum
from shoal.engine.root.manifest import EVENT_TIMESTAMP, TOMBSTONE, Manifest, PublishedFile
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.follow import load as loading
from shoal.loaders.follow.load import NullObserver as NullObserver
from shoal.loaders.segments.arrow_rows import published_schema

NOW = datetime(2026, 1, 1, tzinfo=UTC)
TIMESTAMP = "event_timestamp"

Row = dict[str, Any]
"""A row by column: join keys, features (None or absent is null), and TIMESTAMP (NOW if absent)."""


def schema(view: str, /, *, key: str = "string", ttl: timedelta | None = None, **features: str) -> ViewSchema:
    """Return a view with one join key `<view>_id`."""
    return ViewSchema.model_validate(
        {
            "name": view,
            "join_keys": [{"name": f"{view}_id", "type": key}],
            "features": [{"name": feature, "type": of} for feature, of in features.items()],
            "ttl": ttl,
        }
    )


def publish_snapshot(
    root: ExportRoot, view: ViewSchema, rows: Sequence[Row], *, files: int = 3, **members: Any
) -> Manifest:
    """Publish a full snapshot as the view's next entry. `members` are members of its manifest."""
    return _publish(root, view, "snapshot", rows, (), files, members)


def publish_delta(
    root: ExportRoot,
    view: ViewSchema,
    rows: Sequence[Row],
    tombstones: Sequence[Row] = (),
    *,
    files: int = 2,
    **members: Any,
) -> Manifest:
    """Publish a delta as the view's next entry. Only the join keys and TIMESTAMP of a tombstone are used."""
    return _publish(root, view, "delta", rows, tombstones, files, members)


def sealed(content: Row) -> bytes:
    """Return any JSON content as a document of an export root, with a correct checksum."""
    checksum = xxhash.xxh3_64_hexdigest(orjson.dumps(content, option=orjson.OPT_SORT_KEYS))
    return orjson.dumps(content | {"checksum": checksum})


def falsify(root: ExportRoot, manifest: Manifest, **changes: Any) -> None:
    """Change members of a published entry's manifest, and give the manifest a correct checksum."""
    content = sealed(manifest.model_dump(mode="json") | changes)
    (root.path / manifest.view.name / "deltas" / f"{manifest.seq:012d}" / MANIFEST).write_bytes(content)
    if manifest.kind == "snapshot":
        (root.directory(manifest) / MANIFEST).write_bytes(content)


def load(store: Path, root: ExportRoot, **options: Any) -> list[loading.AppliedEntry]:
    """Load a store as `shoal load` does, and return the applied entries."""
    with StoreWriter(store) as writer:
        return loading.load(writer, root, NullObserver(), **options)


def published_table(view: ViewSchema, rows: Sequence[Row], tombstones: Sequence[Row], *, delta: bool) -> pa.Table:
    """Return rows and tombstones as an exporter writes them, in the order of their hashes."""
    everything = [*rows, *tombstones]
    keys = [pa.array([row[key.name] for row in everything], arrow_type(key.type)) for key in view.join_keys]
    first, second = key_hashes(keys) if everything else (np.array([], np.int64), np.array([], np.int64))
    columns: dict[str, pa.Array] = {
        KEY_HASH: pa.array(first),
        KEY_HASH_2: pa.array(second),
        EVENT_TIMESTAMP: pa.array([row.get(TIMESTAMP, NOW) for row in everything], pa.timestamp("us", tz="UTC")),
    }
    if delta:
        columns[TOMBSTONE] = pa.array([False] * len(rows) + [True] * len(tombstones), pa.bool_())
    dead: list[None] = [None] * len(tombstones)
    for key in view.join_keys:
        columns[key.name] = pa.array([*(row[key.name] for row in rows), *dead], arrow_type(key.type))
    target = published_schema(view, delta=delta)
    for feature in view.features:
        values = [*(row.get(feature.name) for row in rows), *dead]
        columns[feature.name] = pa.array(values, target.field(feature.name).type)
    table = pa.table(columns, schema=target)
    return table.sort_by([(KEY_HASH, "ascending"), (KEY_HASH_2, "ascending")])


def _publish(
    root: ExportRoot,
    view: ViewSchema,
    kind: str,
    rows: Sequence[Row],
    tombstones: Sequence[Row],
    files: int,
    members: Row,
) -> Manifest:
    published = root.sequence_numbers(view.name)
    parent = root.entry(view.name, published[-1]) if published else None
    table = published_table(view, rows, tombstones, delta=kind == "delta")
    times = [row.get(TIMESTAMP, NOW) for row in (*rows, *tombstones)]
    draft = Manifest(
        format_version=root.write_format,
        kind="delta" if kind == "delta" else "snapshot",
        id=uuid.uuid4().hex,
        seq=parent.seq + 1 if parent else root.first_seq(view.name),
        parent=parent.id if parent else None,
        view=view,
        rows=0,
        tombstones=0,
        files=(),
        watermark=max(times, default=None),
        published_at=datetime.now(UTC),
        job="tests",
        inputs=("tests",),
    )
    files_written = _write_files(root.directory(draft), table, files)
    counts = {"rows": len(rows), "tombstones": len(tombstones)}
    manifest = Manifest.model_validate(draft.model_dump() | counts | {"files": files_written} | members)
    root.publish(manifest)
    return manifest


def _write_files(directory: Path, table: pa.Table, count: int) -> tuple[PublishedFile, ...]:
    directory.mkdir(parents=True, exist_ok=True)
    bounds = np.linspace(0, table.num_rows, count + 1).astype(int)
    written = []
    for number, (start, end) in enumerate(itertools.pairwise(bounds)):
        if start == end:
            continue
        part = table.slice(start, end - start)
        path = directory / f"part-{number:05d}.parquet"
        pq.write_table(part, path, row_group_size=max(1, (end - start + 1) // 2))
        hashes = part.column(KEY_HASH).to_numpy()
        written.append(
            PublishedFile(
                path=path.name,
                rows=part.num_rows,
                bytes=os.path.getsize(path),
                checksum=file_checksum(path),
                min_key_hash=int(hashes[0]),
                max_key_hash=int(hashes[-1]),
            )
        )
    return tuple(written)
