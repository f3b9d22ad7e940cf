"""Entries as another tool might publish them: any Parquet content, under a manifest with any claims."""

import uuid
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shoal.engine.format.keys import KEY_HASH
from shoal.engine.format.schema import ViewSchema
from shoal.engine.root.export_root import ExportRoot, file_checksum
from shoal.engine.root.manifest import TOMBSTONE, Manifest
from tests import stores
from tests.stores import Row


def snapshot_table(view: ViewSchema, rows: Iterable[Row]) -> pa.Table:
    """Return a snapshot's rows as an exporter writes them."""
    return stores.published_table(view, list(rows), [], delta=False)


def delta_table(view: ViewSchema, rows: Iterable[Row], tombstones: Iterable[Row] = ()) -> pa.Table:
    """Return a delta's rows and tombstones as an exporter writes them."""
    return stores.published_table(view, list(rows), list(tombstones), delta=True)


def publish(
    root: ExportRoot,
    view: ViewSchema,
    *tables: pa.Table,
    row_group_size: int | None = None,
    use_dictionary: bool = True,
    **changes: Any,
) -> Manifest:
    """Publish tables, one file each, as the view's next entry: a delta if they have tombstones, else a snapshot."""
    published = root.sequence_numbers(view.name) if "parent" not in changes else []
    parent = root.entry(view.name, published[-1]) if published else None
    is_delta = any(TOMBSTONE in table.schema.names for table in tables)
    kind = changes.get("kind", "delta" if is_delta else "snapshot")
    tombstones = changes.get("tombstones")
    if tombstones is None:
        tombstones = sum(pc.sum(table.column(TOMBSTONE)).as_py() or 0 for table in tables) if is_delta else 0
    content: dict[str, Any] = {
        "kind": kind,
        "id": uuid.uuid4().hex,
        "seq": parent.seq + 1 if parent else 1,
        "parent": parent.id if parent else None,
        "view": view,
        "rows": sum(table.num_rows for table in tables) - tombstones,
        "tombstones": tombstones,
        "files": (),
        "watermark": None,
        "published_at": datetime.now(UTC),
        "job": "forgery",
        "inputs": (),
    }
    # The files are written last, because the checks of a validated manifest need them.
    draft = Manifest.model_construct(**(content | changes))
    directory = root.directory(draft)
    directory.mkdir(parents=True)
    files = []
    for number, table in enumerate(tables):
        path = directory / f"part-{number:05d}.parquet"
        pq.write_table(table, path, row_group_size=row_group_size, use_dictionary=use_dictionary)
        files.append(describe(path, table))
    root.publish(Manifest.model_validate(content | {"files": files} | changes))
    return root.entry(view.name, draft.seq)


def describe(path: Path, table: pa.Table) -> dict[str, Any]:
    """Return the manifest's description of a file."""
    hashes = pc.min_max(table.column(KEY_HASH)).as_py()
    return {
        "path": path.name,
        "rows": table.num_rows,
        "bytes": path.stat().st_size,
        "checksum": file_checksum(path),
        "min_key_hash": hashes["min"],
        "max_key_hash": hashes["max"],
    }


def replaced(table: pa.Table, name: str, column: Any) -> pa.Table:
    """Return the table with one column replaced."""
    return table.set_column(table.schema.get_field_index(name), name, column)
