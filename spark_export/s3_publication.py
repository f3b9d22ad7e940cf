"""Put a run's files where readers of a root in S3 find them. There is no rename: what is written lies where it stays,
and is nothing until the log has a manifest that lists it.

Where Spark has Hadoop's s3a, it writes and reads by that; its committers need a directory of the run's own, from which
the parts are copied inside S3. Elsewhere tasks do it themselves: `spark_export.s3_tasks`.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, cast

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from engine.errors import ManifestInvalid, RootNotWritable, RootUnreadable
from engine.export_root import MANIFEST, ExportRoot, log_directory
from engine.failpoints import reached
from engine.manifest import Manifest, PublishedFile
from engine.s3_storage import S3Storage
from spark_export import s3_tasks
from spark_export.description import describe
from spark_export.publication import ABANDONED_AFTER, FILE, is_part, ledger_parts, writing
from spark_export.s3_tasks import Place
from spark_export.table_parts import parts_of, write_part

_S3A = "org.apache.hadoop.fs.s3a.S3AFileSystem"


class S3Staging:
    """Where a run writes in S3: its ledger at once where the state will be, its parts in the entry's directory."""

    def __init__(self, root: ExportRoot, view: str, run: str, seq: int) -> None:
        assert isinstance(root.storage, S3Storage)
        self.root, self.storage = root, root.storage
        self.run, self.seq = run, seq
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
        directory, place = self._directory(kind), Place.of(self.storage)
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
        directory, files = self._directory(kind), []
        for number, part in enumerate(parts_of(table)):
            name = f"part-{self.run[:8]}-{number:05d}.parquet"
            with tempfile.TemporaryFile(prefix="shoal-") as stream:
                write_part(part, cast("BinaryIO", stream))
                files.append(describe(name, cast("BinaryIO", stream)))
                self._written.append(f"{directory}/{name}")
                self.storage.upload(self._written[-1], cast("BinaryIO", stream))
        return tuple(files)

    def publish(self, manifest: Manifest) -> None:
        """As `Staging.publish`: all lies there already."""
        with writing(self.root):
            self.root.publish(manifest)
        reached("export.published")

    def _directory(self, kind: str) -> str:
        return f"{self.view}/snapshots/{self.state}" if kind == "snapshot" else log_directory(self.view, self.seq)

    def clear(self, *, published: bool) -> None:
        """Remove what a run leaves that nobody needs; what cannot be removed stays unseen."""
        with suppress(RootNotWritable, RootUnreadable):
            self.storage.remove_directory(self._aside)
            if not published:
                self.storage.remove(self._written)
                self.storage.remove_directory(self._ledger)


@contextmanager
def s3_staging(root: ExportRoot, view: str, run: str, seq: int) -> Iterator[S3Staging]:
    """As `spark_export.publication.staging`, for a root in S3."""
    stage = S3Staging(root, view, run, seq)
    with writing(root):
        _clear_abandoned(stage.storage, view)
    try:
        yield stage
    finally:
        stage.clear(published=_is_in_log(root, view, seq, run))


def read_prefix(root: ExportRoot, spark: SparkSession, directory: str, columns: str) -> DataFrame:
    """The Parquet files below a directory of a root in S3; `columns` is their schema as DDL."""
    storage = root.storage
    assert isinstance(storage, S3Storage)
    names = ledger_parts(storage, directory)
    if names and (url := s3a_url(spark, storage)) is not None:
        return spark.read.schema(columns).parquet(*(f"{url}/{name}" for name in names))
    return s3_tasks.read_parts(Place.of(storage), spark, names, columns)


def read_objects(root: ExportRoot, spark: SparkSession, names: Sequence[str], columns: str) -> DataFrame:
    """As `spark_export.publication.read_parts`, for a root in S3."""
    storage = root.storage
    assert isinstance(storage, S3Storage)
    if names and (url := s3a_url(spark, storage)) is not None:
        rows = spark.read.schema(columns).parquet(*(f"{url}/{name}" for name in names))
        return rows.withColumn(FILE, F.col("_metadata.file_path"))
    return s3_tasks.read_parts(Place.of(storage), spark, names, f"{columns}, `{FILE}` string", file_column=FILE)


def s3a_url(spark: SparkSession, storage: S3Storage) -> str | None:
    """The root's URL for Hadoop's s3a, which is told what boto3 knows of the endpoint; None where Spark has no s3a."""
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
    """Remove what runs left that ended long ago: what Spark wrote aside, and snapshots that were not published."""
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
    """Whether a run published; one that cannot be asked for may have."""
    try:
        return root.has_entry(view, seq) and root.entry(view, seq).id == run
    except (RootUnreadable, ManifestInvalid, OSError):
        return True
