"""A laboratory for exports: a view over real files, exported by real Spark, and what came of it, read without Spark."""

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from pyspark.sql import SparkSession

from engine.export_root import ExportRoot
from engine.keys import KEY_HASH, KEY_HASH_2, key_identity
from engine.manifest import EVENT_TIMESTAMP, TOMBSTONE, Manifest
from engine.schema import arrow_type
from spark_export.exporter import export
from spark_export.report import Report
from spark_export.views import ViewsFile, load_views

VIEW = "docs"
KEY = "doc_id"
TIMESTAMP = "event_timestamp"
NOW = datetime.now(UTC)

Row = dict[str, Any]
"""A row of a source by column; a column that is absent is null."""

Key = tuple[str | int, ...]


def ago(**duration: float) -> datetime:
    """An event time before the tests began."""
    return NOW - timedelta(**duration)


class Lab:
    """One view, its source and its export root in a directory."""

    def __init__(self, directory: Path, spark: SparkSession) -> None:
        self.directory = directory
        self.spark = spark
        # Spark would take the name for a pattern if it were let.
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
        """Write views.yaml; `settings` are further members of the view, None to leave one out."""
        self.keys, self.features = dict(keys or {KEY: "string"}), dict(features)
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
        """Make `rows` the whole source. Columns have the types of the definition, or those in `types`."""
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
        """The rows of an entry, its files checked against the manifest and one after the other."""
        tables = [pq.read_table(self.root.checked_file(manifest, file)) for file in manifest.files]
        return pa.concat_tables(tables)

    def published(self, manifest: Manifest) -> tuple[dict[Key, Row], dict[tuple[int, int], datetime]]:
        """An entry's rows by key, and the event times of its tombstones by the key's hashes."""
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
        """The event time of each row on a node that followed the whole log, and the time by which it judges its age."""
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
        """What a node serves that followed the whole log: the newest event time of each key, then the newest seq."""
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
        """Everything in the export root, by relative path."""
        return {str(path.relative_to(self.root.path)) for path in self.root.path.rglob("*") if path.is_file()}


def plain(value: Any) -> Any:
    """A value such that == holds where the exporter sees no change: NaN is NaN, and -0.0 is 0.0."""
    if isinstance(value, float):
        return "NaN" if math.isnan(value) else value + 0.0
    return [plain(item) for item in value] if isinstance(value, list) else value
