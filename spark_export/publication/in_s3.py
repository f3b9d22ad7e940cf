"""Publish the files of a run in S3. S3 has no rename, so files are written to their final place. They are invisible
until a manifest in the log lists them.

If Spark has Hadoop's s3a, Spark writes and reads with it. The committers of s3a need a separate directory for each run;
the parts are then copied inside S3. Without s3a, the tasks write and read by themselves:
`shoal.spark_export.publication.s3_tasks`.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, cast

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from shoal.engine.base.errors import ManifestInvalid, RootNotWritable, RootUnreadable
from shoal.engine.base.failpoints import reached
from shoal.engine.root.export_root import MANIFEST, ExportRoot, log_directory
from shoal.engine.root.manifest import Manifest, PublishedFile
from shoal.engine.root.s3_storage import S3Storage
from shoal.spark_export.publication import s3_tasks
from shoal.spark_export.publication.description import describe
from shoal.spark_export.publication.s3_tasks import Place
from shoal.spark_export.publication.staging import ABANDONED_AFTER, FILE, is_part, ledger_parts, write_errors_named
from shoal.spark_export.publication.table_parts import parts_of, write_part

_S3A = "org.apache.hadoop.fs.s3a.S3AFileSystem"


class S3Staging:
    """The staging of a run in S3. It writes the ledger directly to the state's directory, and the parts to the entry's
    directory."""

    def __init__(self, root: ExportRoot, view: str, run: str, seq: int) -> None:
        assert isinstance(root.storage, S3Storage)
        self.root = root
        self.storage = root.storage
        self.run = run
        self.seq = seq
        self.state = f"{seq:012d}-{run[:8]}"
        self.view = view
        self._aside = f"{view}/_staging/{run}"
        self._ledger = f"{view}/state/{self.state}"
        self._written: list[str] = []

    def write_ledger(self, ledger: DataFrame) -> None:
        if (url := s3a_url(ledger.sparkSession, self.storage)) is not None:
            ledger.write.parquet(f"{url}/{self._ledger}")
        else:
            s3_tasks.write_ledger(Place.of(self.storage), ledger, self._ledger)

    def read_ledger(self, spark: SparkSession, columns: str) -> DataFrame:
        return read_prefix(self.root, spark, self._ledger, columns)

    def write_parts(self, kind: str, rows: DataFrame) -> tuple[PublishedFile, ...]:
        directory = self._directory(kind)
        place = Place.of(self.storage)
        url = s3a_url(rows.sparkSession, self.storage)
        if url is None:
            files = s3_tasks.write_parts(place, rows, directory, self.run)
            self._written = [f"{directory}/{file.path}" for file in files]
            return files
        rows.write.parquet(f"{url}/{self._aside}")
        names = [file.name for file in self.storage.files(self._aside) if is_part(file.name)]
        described = s3_tasks.describe_parts(place, rows.sparkSession, names)
        files = tuple(
            file.model_copy(update={"path": f"part-{self.run[:8]}-{number:05d}.parquet"})
            for number, file in enumerate(described)
        )
        for file, source in zip(files, described, strict=True):
            self._written.append(f"{directory}/{file.path}")
            self.storage.copy(f"{self._aside}/{source.path}", self._written[-1])
        return files

    def write_table(self, kind: str, table: pa.Table) -> tuple[PublishedFile, ...]:
        directory = self._directory(kind)
        files = []
        for number, part in enumerate(parts_of(table)):
            name = f"part-{self.run[:8]}-{number:05d}.parquet"
            with tempfile.TemporaryFile(prefix="shoal-") as stream:
                write_part(part, cast("BinaryIO", stream))
                files.append(describe(name, cast("BinaryIO", stream)))
                self._written.append(f"{directory}/{name}")
                self.storage.upload(self._written[-1], cast("BinaryIO", stream))
        return tuple(files)

    def publish(self, manifest: Manifest) -> None:
        """Publish like `Staging.publish`. All files are already in place."""
        with write_errors_named(self.root):
            self.root.publish(manifest)
        reached("export.published")

    def _directory(self, kind: str) -> str:
        return f"{self.view}/snapshots/{self.state}" if kind == "snapshot" else log_directory(self.view, self.seq)

    def clear(self, *, published: bool) -> None:
        """Remove the files of a run that nobody needs any more. Ignore errors: without a manifest the files are
        invisible."""
        with suppress(RootNotWritable, RootUnreadable):
            self.storage.remove_directory(self._aside)
            if not published:
                self.storage.remove(self._written)
                self.storage.remove_directory(self._ledger)


@contextmanager
def s3_staging(root: ExportRoot, view: str, run: str, seq: int) -> Iterator[S3Staging]:
    """Open the staging of a run like `shoal.spark_export.publication.opening.staging`, for a root in S3."""
    stage = S3Staging(root, view, run, seq)
    with write_errors_named(root):
        _clear_abandoned(stage.storage, view)
    try:
        yield stage
    finally:
        stage.clear(published=_is_in_log(root, view, seq, run))


def read_prefix(root: ExportRoot, spark: SparkSession, directory: str, columns: str) -> DataFrame:
    """Return the rows of the Parquet files below a directory of a root in S3; `columns` is their schema as DDL."""
    storage = root.storage
    assert isinstance(storage, S3Storage)
    names = ledger_parts(storage, directory)
    if names and (url := s3a_url(spark, storage)) is not None:
        return spark.read.schema(columns).parquet(*(f"{url}/{name}" for name in names))
    return s3_tasks.read_parts(Place.of(storage), spark, names, columns)


def read_objects(root: ExportRoot, spark: SparkSession, names: Sequence[str], columns: str) -> DataFrame:
    """Return rows like `shoal.spark_export.publication.opening.read_parts`, for a root in S3."""
    storage = root.storage
    assert isinstance(storage, S3Storage)
    if names and (url := s3a_url(spark, storage)) is not None:
        rows = spark.read.schema(columns).parquet(*(f"{url}/{name}" for name in names))
        return rows.withColumn(FILE, F.col("_metadata.file_path"))
    return s3_tasks.read_parts(Place.of(storage), spark, names, f"{columns}, `{FILE}` string", file_column=FILE)


def s3a_url(spark: SparkSession, storage: S3Storage) -> str | None:
    """Return the root's URL for Hadoop's s3a; None if Spark has no s3a. Copy the storage's endpoint and region to s3a's
    settings unless these are already set."""
    jvm: Any = spark._jvm
    if not jvm.org.apache.spark.util.Utils.classIsLoadable(_S3A):
        return None
    known = spark.sparkContext._jsc.hadoopConfiguration()
    if storage.endpoint is not None and not known.get("fs.s3a.endpoint"):
        spark.conf.set("fs.s3a.endpoint", storage.endpoint)
        spark.conf.set("fs.s3a.path.style.access", "true")
        spark.conf.set("fs.s3a.connection.ssl.enabled", str(storage.endpoint.startswith("https")).lower())
    if storage.region is not None and not known.get("fs.s3a.endpoint.region"):
        spark.conf.set("fs.s3a.endpoint.region", storage.region)
    return f"s3a://{storage.bucket}/{storage.prefix}".rstrip("/")


def _clear_abandoned(storage: S3Storage, view: str) -> None:
    """Remove the files of runs that ended long ago: staging directories, and snapshots without a manifest."""
    last_change: dict[str, float] = {}
    listed: set[str] = set()
    for part in ("_staging", "snapshots"):
        for file in storage.files(f"{view}/{part}"):
            directory = "/".join(file.name.split("/")[:3])
            last_change[directory] = max(file.changed, last_change.get(directory, 0.0))
            if file.name == f"{directory}/{MANIFEST}":
                listed.add(directory)
    for directory, changed in last_change.items():
        if directory not in listed and time.time() - changed > ABANDONED_AFTER:
            storage.remove_directory(directory)


def _is_in_log(root: ExportRoot, view: str, seq: int, run: str) -> bool:
    """Return whether a run published its entry; True if the entry cannot be read, because it may be the run's."""
    try:
        return root.has_entry(view, seq) and root.entry(view, seq).id == run
    except (RootUnreadable, ManifestInvalid, OSError):
        return True
