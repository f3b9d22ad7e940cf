"""Publish the files of a run in a directory: write them to a staging directory, move them into place, and make them
visible with one manifest."""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from shoal.engine.base.failpoints import reached
from shoal.engine.root.directory_storage import sync_directory
from shoal.engine.root.export_root import MANIFEST, ExportRoot
from shoal.engine.root.manifest import Manifest, PublishedFile
from shoal.spark_export.publication.description import describe
from shoal.spark_export.publication.staging import (
    ABANDONED_AFTER,
    FILE,
    is_published,
    state_directory,
    write_errors_named,
)
from shoal.spark_export.publication.table_parts import parts_of, write_part
from shoal.spark_export.source.rows import literal_uri

_THREADS = 4
_PARTS = "part-*.parquet"


class DirectoryStaging:
    """The staging directory of a run. It must be on a file system that the driver and all executors mount."""

    def __init__(self, root: ExportRoot, view: str, run: str, seq: int) -> None:
        self.root = root
        self.run = run
        self.state = f"{seq:012d}-{run[:8]}"
        self.directory = root.path / view / "_staging" / run
        self.parts = self.directory / "parts"
        self.ledger = self.directory / "ledger"

    def write_ledger(self, ledger: DataFrame) -> None:
        ledger.write.parquet(f"file://{self.ledger}")

    def read_ledger(self, spark: SparkSession, columns: str) -> DataFrame:
        return read_directory(spark, self.ledger, columns)

    def write_parts(self, kind: str, rows: DataFrame) -> tuple[PublishedFile, ...]:
        rows.write.parquet(f"file://{self.parts}")
        return self.files()

    def write_table(self, kind: str, table: pa.Table) -> tuple[PublishedFile, ...]:
        self.parts.mkdir()
        for number, part in enumerate(parts_of(table)):
            write_part(part, self.parts / f"part-{number:05d}.parquet")
        return self.files()

    def files(self) -> tuple[PublishedFile, ...]:
        """Give the written parts their final names, make them durable, and return their descriptions, ordered by key
        hash."""
        paths: list[Path] = []
        for path in sorted(self.parts.glob(_PARTS)):
            # Spark writes a file for its first partition even if that has no rows.
            if pq.read_metadata(path).num_rows:
                paths.append(path.rename(self.parts / f"part-{self.run[:8]}-{len(paths):05d}.parquet"))
        with ThreadPoolExecutor(_THREADS) as threads:
            return tuple(threads.map(_describe, paths))

    def publish(self, manifest: Manifest) -> None:
        """Publish like `Staging.publish`, by moving the files into place."""
        directory = self.root.directory(manifest)
        named = state_directory(manifest)
        state = self.root.path / named if named else None
        try:
            with write_errors_named(self.root):
                directory.mkdir(parents=True, exist_ok=True)
                for file in manifest.files:
                    (self.parts / file.path).rename(directory / file.path)
                reached("export.parts-moved")
                if state is not None:
                    self._move_ledger(state)
                    reached("export.state-moved")
                for path in (directory, directory.parent, directory.parent.parent, self.root.path):
                    sync_directory(path)
                self.root.publish(manifest)
        except BaseException:
            if not is_published(self.root, manifest):
                _take_away(manifest, directory, state)
            raise
        reached("export.published")

    def _move_ledger(self, state: Path) -> None:
        state.parent.mkdir(exist_ok=True)
        for path in self.ledger.glob(_PARTS):
            _make_durable(path)
        self.ledger.rename(state)
        for path in (state, state.parent):
            sync_directory(path)


@contextmanager
def directory_staging(root: ExportRoot, view: str, run: str, seq: int) -> Iterator[DirectoryStaging]:
    """Open the staging of a run like `shoal.spark_export.publication.opening.staging`, for a root in a directory."""
    stage = DirectoryStaging(root, view, run, seq)
    with write_errors_named(root):
        stage.directory.mkdir(parents=True)
    try:
        for other in (*stage.directory.parent.iterdir(), *_unlisted_snapshots(root, view)):
            if time.time() - _last_change(other) > ABANDONED_AFTER:
                shutil.rmtree(other, ignore_errors=True)
        yield stage
    finally:
        shutil.rmtree(stage.directory, ignore_errors=True)


def read_directory(spark: SparkSession, directory: Path, columns: str) -> DataFrame:
    """Return the rows of the Parquet files in a directory; `columns` is their schema as DDL."""
    return spark.read.schema(columns).parquet(literal_uri(directory))


def read_files(spark: SparkSession, paths: Sequence[Path], columns: str) -> DataFrame:
    """Return rows like `shoal.spark_export.publication.opening.read_parts`, for files given by their paths."""
    rows = spark.read.schema(columns).parquet(*map(literal_uri, paths)) if paths else spark.createDataFrame([], columns)
    return rows.withColumn(FILE, F.col("_metadata.file_path") if paths else F.lit(""))


def _describe(path: Path) -> PublishedFile:
    _make_durable(path)
    with path.open("rb") as stream:
        return describe(path.name, stream)


def _make_durable(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _take_away(manifest: Manifest, directory: Path, state: Path | None) -> None:
    """Remove the files that a run moved into place. Ignore errors: without a manifest the files are invisible, and the
    caller reports the original error."""
    for file in manifest.files:
        with suppress(OSError):
            (directory / file.path).unlink()
    with suppress(OSError):
        directory.rmdir()
    if state is not None:
        shutil.rmtree(state, ignore_errors=True)


def _unlisted_snapshots(root: ExportRoot, view: str) -> list[Path]:
    """Return the directories of snapshots without a manifest: not yet published, or no longer published."""
    return [path for path in (root.path / view / "snapshots").glob("*/") if not (path / MANIFEST).exists()]


def _last_change(directory: Path) -> float:
    """Return the time of the last change in a directory, in seconds since the epoch. Return the current time if files
    vanish meanwhile."""
    try:
        return max(path.stat().st_mtime for path in (directory, *directory.rglob("*")))
    except FileNotFoundError:
        return time.time()
