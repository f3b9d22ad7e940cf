"""Put a run's files where readers of a directory find them: staged aside, moved into place, and then made to exist by
one manifest."""

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

from engine.directory_storage import sync_directory
from engine.export_root import MANIFEST, ExportRoot
from engine.failpoints import reached
from engine.manifest import Manifest, PublishedFile
from spark_export.description import describe
from spark_export.publication import ABANDONED_AFTER, FILE, is_published, state_directory, writing
from spark_export.source import literal_uri
from spark_export.table_parts import parts_of, write_part

_THREADS = 4
_PARTS = "part-*.parquet"


class DirectoryStaging:
    """The directory that a run writes in before it publishes, by a file system that all of Spark mounts."""

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
        """Name the parts that Spark wrote for good, make them durable, and describe them, ordered by key hash."""
        paths: list[Path] = []
        for path in sorted(self.parts.glob(_PARTS)):
            # Spark writes a file for its first partition even if that has no rows.
            if pq.read_metadata(path).num_rows:
                paths.append(path.rename(self.parts / f"part-{self.run[:8]}-{len(paths):05d}.parquet"))
        with ThreadPoolExecutor(_THREADS) as threads:
            return tuple(threads.map(_describe, paths))

    def publish(self, manifest: Manifest) -> None:
        """As `Staging.publish`: by moving them there."""
        directory, named = self.root.directory(manifest), state_directory(manifest)
        state = self.root.path / named if named else None
        try:
            with writing(self.root):
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
    """As `spark_export.publication.staging`, for a root that is a directory."""
    stage = DirectoryStaging(root, view, run, seq)
    with writing(root):
        stage.directory.mkdir(parents=True)
    try:
        for other in (*stage.directory.parent.iterdir(), *_unlisted_snapshots(root, view)):
            if time.time() - _last_change(other) > ABANDONED_AFTER:
                shutil.rmtree(other, ignore_errors=True)
        yield stage
    finally:
        shutil.rmtree(stage.directory, ignore_errors=True)


def read_directory(spark: SparkSession, directory: Path, columns: str) -> DataFrame:
    """The Parquet files in a directory."""
    return spark.read.schema(columns).parquet(literal_uri(directory))


def read_files(spark: SparkSession, paths: Sequence[Path], columns: str) -> DataFrame:
    """As `spark_export.publication.read_parts`, by the paths of the files."""
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
    """Take away what a run moved. What cannot be removed stays unseen; the error that led here is what counts."""
    for file in manifest.files:
        with suppress(OSError):
            (directory / file.path).unlink()
    with suppress(OSError):
        directory.rmdir()
    if state is not None:
        shutil.rmtree(state, ignore_errors=True)


def _unlisted_snapshots(root: ExportRoot, view: str) -> list[Path]:
    """Snapshots whose runs have not published them: not yet, or not any more."""
    return [path for path in (root.path / view / "snapshots").glob("*/") if not (path / MANIFEST).exists()]


def _last_change(directory: Path) -> float:
    """The time of the last change to anything in a directory, in seconds since the epoch; now, if it is vanishing."""
    try:
        return max(path.stat().st_mtime for path in (directory, *directory.rglob("*")))
    except FileNotFoundError:
        return time.time()
