"""A lab for exports: a view over real files, exported by real Spark and read back without Spark."""

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from pyspark.sql import SparkSession

from shoal.engine.format.keys import KEY_HASH, KEY_HASH_2, key_identity
from shoal.engine.format.schema import arrow_type
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.root.manifest import EVENT_TIMESTAMP, TOMBSTONE, Manifest
from shoal.spark_export.exporter import export
from shoal.spark_export.report import Report
from shoal.spark_export.views.definition import ViewsFile, load_views

VIEW = "docs"
KEY = "doc_id"
TIMESTAMP = "event_timestamp"
NOW = datetime.now(UTC)

Row = dict[str, Any]
"""A row of a source by column; a column that is absent is null."""

Key = tuple[str | int, ...]


def ago(**duration: float) -> datetime:
    """Return an event time before the start of the tests."""
    return NOW - timedelta(**duration)


class Lab:
    """One view, its source and its export root in a directory."""

    def __init__(self, directory: Path, spark: SparkSession) -> None:
        self.directory = directory
        self.spark = spark
        # Unescaped, Spark would read this name as a pattern.
        self.root = ExportRoot(directory / "export root [1]*")
        self.views_path = directory / "views.yaml"
        self.source = directory / "source"
        self.keys: dict[str, str] = {}
        self.features: dict[str, str] = {}

    def define(
        self,
        features: Mapping[str, str],
        *,
        keys: Mapping[str, str] | None = None,
        tolerances: Mapping[str, float] | None = None,
        **settings: Any,
    ) -> None:
        """Write views.yaml. `settings` are further members of the view; the value None removes a member."""
        self.keys = dict(keys or {KEY: "string"})
        self.features = dict(features)
        definitions: list[dict[str, Any]] = [{"name": name, "type": of} for name, of in features.items()]
        for definition in definitions:
            if definition["name"] in (tolerances or {}):
                definition["tolerance"] = (tolerances or {})[definition["name"]]
        view = {
            "name": VIEW,
            "join_keys": [{"name": name, "type": of} for name, of in self.keys.items()],
            "features": definitions,
            "timestamp_field": TIMESTAMP,
            "source": {"path": "source"},
            "shards": 3,
        } | settings
        view = {name: value for name, value in view.items() if value is not None}
        self.views_path.write_text(yaml.safe_dump({"views": [view]}, sort_keys=False))

    def put(self, rows: Sequence[Row], **types: pa.DataType) -> None:
        """Replace the whole source by `rows`. Columns have the types of the definition, or those in `types`."""
        columns: dict[str, pa.DataType] = {name: arrow_type(of) for name, of in (self.keys | self.features).items()}
        columns = {TIMESTAMP: pa.timestamp("us", tz="UTC")} | columns | types
        data = {name: pa.array([row.get(name) for row in rows], of) for name, of in columns.items()}
        self.source.mkdir(exist_ok=True)
        pq.write_table(pa.table(data), self.source / "rows.parquet")

    def views(self) -> ViewsFile:
        return load_views(self.views_path)

    def export(self, **options: Any) -> Report:
        (report,) = export(self.views(), self.root, spark=self.spark, **options)
        return report

    def seqs(self) -> list[int]:
        return self.root.sequence_numbers(VIEW)

    def newest(self) -> Manifest:
        return self.root.entry(VIEW, self.seqs()[-1])

    def table(self, manifest: Manifest) -> pa.Table:
        """Return the rows of all files of an entry in order, after checking the files against the manifest."""
        tables = [pq.read_table(self.root.checked_file(manifest, file)) for file in manifest.files]
        return pa.concat_tables(tables)

    def published(self, manifest: Manifest) -> tuple[dict[Key, Row], dict[tuple[int, int], datetime]]:
        """Return an entry's rows by key, and the event times of its tombstones by the key's hashes."""
        rows: dict[Key, Row] = {}
        tombstones: dict[tuple[int, int], datetime] = {}
        for row in self.table(manifest).to_pylist() if manifest.files else []:
            identity = row.pop(KEY_HASH), row.pop(KEY_HASH_2)
            key = tuple(row[name] for name in self.keys)
            if row.pop(TOMBSTONE, False):
                assert set(row.values()) == {None, row[EVENT_TIMESTAMP]}
                assert identity not in tombstones
                tombstones[identity] = row[EVENT_TIMESTAMP]
            else:
                assert identity == key_identity(key)
                assert key not in rows
                rows[key] = row
        assert (len(rows), len(tombstones)) == (manifest.rows, manifest.tombstones)
        return rows, tombstones

    def judged_by(self) -> dict[Key, tuple[datetime, datetime]]:
        """Return two times for each row on a node after it followed the whole log.

        They are the row's event time, and the time from which the node counts the row's age.
        """
        rows: dict[Key, tuple[datetime, bool]] = {}
        low_watermark = None
        for seq in self.seqs():
            manifest = self.root.entry(VIEW, seq)
            low_watermark = manifest.low_watermark
            assert low_watermark is not None
            published, _ = self.published(manifest)
            if manifest.kind == "snapshot":
                rows = {}
            for key, row in published.items():
                moment = row[EVENT_TIMESTAMP]
                if key not in rows or moment >= rows[key][0]:
                    rows[key] = moment, moment < low_watermark
        assert low_watermark is not None
        return {key: (moment, moment if own else max(moment, low_watermark)) for key, (moment, own) in rows.items()}

    def served(self) -> dict[Key, Row]:
        """Return the rows that a node serves after it followed the whole log: the newest event time of each key wins,
        then the newest seq."""
        newest: dict[tuple[int, int], tuple[datetime, Row | None]] = {}
        for seq in self.seqs():
            manifest = self.root.entry(VIEW, seq)
            rows, tombstones = self.published(manifest)
            changes: dict[tuple[int, int], tuple[datetime, Row | None]] = {
                key_identity(key): (row[EVENT_TIMESTAMP], row) for key, row in rows.items()
            }
            changes |= {identity: (moment, None) for identity, moment in tombstones.items()}
            if manifest.kind == "snapshot":
                newest = changes
            for identity, change in changes.items():
                if identity not in newest or change[0] >= newest[identity][0]:
                    newest[identity] = change
        return {tuple(row[name] for name in self.keys): row for _, row in newest.values() if row is not None}

    def files(self) -> set[str]:
        """Return the relative paths of all files in the export root."""
        return {str(path.relative_to(self.root.path)) for path in self.root.path.rglob("*") if path.is_file()}


def plain(value: Any) -> Any:
    """Return a value that compares equal where the exporter sees no change: NaN equals NaN, and -0.0 equals 0.0."""
    if isinstance(value, float):
        return "NaN" if math.isnan(value) else value + 0.0
    return [plain(item) for item in value] if isinstance(value, list) else value
