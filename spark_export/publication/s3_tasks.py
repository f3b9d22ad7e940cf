"""Write to S3 and read from it in Spark's tasks, without Hadoop's s3a. Each task writes and reads Parquet with Arrow.

No row passes through the driver: the driver gets one line per file. Executors need Python with Shoal and its extra
`s3`. Boto3 finds credentials on each executor in its usual way.
"""

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq
from pyspark import TaskContext
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from shoal.engine.root.manifest import PublishedFile
from shoal.engine.root.s3_storage import S3Storage
from shoal.spark_export.publication.description import describe
from shoal.spark_export.publication.table_parts import dictionary_columns

_DESCRIPTION = "description string"
_PARTITIONS_A_CORE = 32
_ROWS_IN_GROUP = 131_072
"""The same size as in the settings for Spark's own writer in `shoal.spark_export.source.session`."""


@dataclass(frozen=True)
class Place:
    """The address of an export root in S3, for use in a task. The task uses the executor's own credentials."""

    address: str
    endpoint: str | None
    region: str | None

    @classmethod
    def of(cls, storage: S3Storage) -> "Place":
        return cls(str(storage), storage.endpoint, storage.region)

    def open(self) -> S3Storage:
        return _storage(self)


@cache
def _storage(place: Place) -> S3Storage:
    """Return the storage of a place. There is one per process, because Spark runs many tasks in one process."""
    return S3Storage(place.address, endpoint=place.endpoint, region=place.region)


def write_ledger(place: Place, rows: DataFrame, directory: str) -> None:
    """Write one file per partition with rows. A repeated task writes the same file again."""

    def write(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        with _as_parquet(batches) as stream:
            if stream.tell():
                place.open().upload(f"{directory}/part-{_partition():05d}.parquet", stream)
        yield from ()

    rows.mapInArrow(write, _DESCRIPTION).collect()


def write_parts(place: Place, rows: DataFrame, directory: str, run: str) -> tuple[PublishedFile, ...]:
    """Write one file per partition with rows. Return the descriptions of the files, ordered by key hash. The rows of
    each partition must be sorted by key hash.

    Each attempt of a task writes a file with a different name, so that a description always matches its file.
    """

    def write(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        context = TaskContext.get()
        assert context is not None
        name = f"part-{run[:8]}-{_partition():05d}-{context.taskAttemptId()}.parquet"
        with _as_parquet(batches) as stream:
            if stream.tell():
                described = describe(name, stream)
                place.open().upload(f"{directory}/{name}", stream)
                yield _described(described)

    return _collected(rows.mapInArrow(write, _DESCRIPTION))


def describe_parts(place: Place, spark: SparkSession, names: list[str]) -> tuple[PublishedFile, ...]:
    """Return the descriptions of files in S3, given by their names in the root. Files without rows are omitted."""

    def read(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        storage = place.open()
        for name in _values(batches):
            with storage.fetch(name, storage.size(name)) as stream:
                if pq.read_metadata(stream).num_rows:
                    yield _described(describe(name.rpartition("/")[2], stream))

    return _collected(_spread(spark, names).mapInArrow(read, _DESCRIPTION))


def read_parts(
    place: Place, spark: SparkSession, names: Sequence[str], columns: str, *, file_column: str | None = None
) -> DataFrame:
    """Return the rows of Parquet files, given by their names in the root. `columns` is the schema as DDL. The column
    `file_column` contains the name of the file. Any other column that a file lacks is null."""
    schema = spark.createDataFrame([], columns).toArrow().schema

    def read(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        storage = place.open()
        for name in _values(batches):
            with storage.fetch(name, storage.size(name)) as stream:
                for batch in pq.ParquetFile(stream).iter_batches():
                    yield _fitted(batch, schema, {file_column: name})

    return _spread(spark, names).mapInArrow(read, columns)


def _spread(spark: SparkSession, names: Sequence[str]) -> DataFrame:
    """Return a table of names with one partition per name, but at most 32 partitions per core."""
    most = _PARTITIONS_A_CORE * spark.sparkContext.defaultParallelism
    numbered = spark.range(len(names), numPartitions=max(1, min(len(names), most)))
    return numbered.select(F.element_at(F.lit(list(names)), (F.col("id") + 1).cast("int")).alias("name"))


def _fitted(batch: pa.RecordBatch, schema: pa.Schema, constants: Mapping[str | None, str]) -> pa.RecordBatch:
    """Return the rows with the columns of a schema. Each column is a constant, comes from the batch, or is null."""
    columns = []
    for field in schema:
        if field.name in constants:
            columns.append(pa.repeat(pa.scalar(constants[field.name], field.type), batch.num_rows))
        elif field.name in batch.schema.names:
            columns.append(batch[field.name].cast(field.type))
        else:
            columns.append(pa.nulls(batch.num_rows, field.type))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _as_parquet(batches: Iterable[pa.RecordBatch]) -> BinaryIO:
    """Return an unnamed temporary file on this machine with the rows as Parquet. Its position is at its end; the file
    is empty if there are no rows."""
    stream = cast("BinaryIO", tempfile.TemporaryFile(prefix="shoal-"))  # noqa: SIM115
    writer: Any = None
    for table in _row_groups(batches):
        if writer is None:
            names = dictionary_columns(table.schema)
            writer = pq.ParquetWriter(
                stream, table.schema, compression="zstd", compression_level=1, use_dictionary=names
            )
        writer.write_table(table, row_group_size=_ROWS_IN_GROUP)
    if writer is not None:
        writer.close()
    return stream


def _row_groups(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    held: list[pa.RecordBatch] = []
    for batch in batches:
        if batch.num_rows:
            held.append(batch)
        if sum(part.num_rows for part in held) >= _ROWS_IN_GROUP:
            yield pa.Table.from_batches(held)
            held = []
    if held:
        yield pa.Table.from_batches(held)


def _values(batches: Iterator[pa.RecordBatch]) -> Iterator[str]:
    for batch in batches:
        yield from batch.column(0).to_pylist()


def _described(file: PublishedFile) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict({"description": [file.model_dump_json()]})


def _collected(descriptions: DataFrame) -> tuple[PublishedFile, ...]:
    files = (PublishedFile.model_validate_json(text) for (text,) in descriptions.collect())
    return tuple(sorted(files, key=lambda file: file.min_key_hash))


def _partition() -> int:
    context = TaskContext.get()
    assert context is not None
    return context.partitionId()
