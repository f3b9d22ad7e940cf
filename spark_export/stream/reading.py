"""Open a view's stream: read its events with Spark, and apply the view's query to them."""

from datetime import timedelta
from typing import cast

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import StructType

from shoal.engine.base.errors import SourceError
from shoal.spark_export.source.partition_texts import read_as_declared
from shoal.spark_export.source.rows import conform, file_uri, hint_of
from shoal.spark_export.source.spark_errors import raised_as
from shoal.spark_export.views.definition import Stream, ViewDefinition

EVENTS = "events"
"""The name of the table with the events, for a stream's query."""

_MOST_RECORDS = 100_000
_MOST_BYTES = 64 << 20
"""The default limits of a micro-batch, in records from Kafka and in bytes from files. A batch is limited because the
driver holds it in memory."""

_KAFKA_VALUE = "value"
_MILLISECOND = timedelta(milliseconds=1)


def open_stream(view: ViewDefinition, spark: SparkSession) -> DataFrame:
    """Return a view's rows as a streaming DataFrame from `shoal.spark_export.source.rows.conform`. `spark` must be a
    session for this stream alone, because the view `events` is defined in it.

    Raises:
        SourceError: Spark cannot read the stream, a column is missing, or a column's type does not fit.
    """
    stream = view.stream
    assert stream is not None
    with raised_as(SourceError, f"view {view.name!r}: its {stream} cannot be read", hint_of):
        events = _events(view, stream, spark)
        if stream.event_time is not None and stream.watermark is not None:
            events = events.withWatermark(stream.event_time, f"{stream.watermark // _MILLISECOND} milliseconds")
        if stream.sql is not None:
            events.createOrReplaceTempView(EVENTS)
            events = spark.sql(stream.sql)
        return conform(view, events, 0, stream)


def _events(view: ViewDefinition, stream: Stream, spark: SparkSession) -> DataFrame:
    reader = spark.readStream.format(stream.format).options(**_bounded(stream))
    if stream.format == "kafka":
        records = reader.load()
        if stream.columns is None:
            return records
        event = F.from_json(F.col(_KAFKA_VALUE).cast("string"), stream.columns)
        return records.select(event.alias(_KAFKA_VALUE)).select(f"{_KAFKA_VALUE}.*")
    if stream.columns is not None:
        reader = reader.schema(stream.columns)
    if stream.path is None:
        return reader.load()
    files = reader.load(file_uri(stream.path, stream.format.lower()))
    if stream.columns is None:
        return files
    # Columns that `columns` does not declare are partition columns: their values are names of directories.
    declared = cast("StructType", StructType.fromDDL(stream.columns)).fieldNames()
    return read_as_declared(view, files, frozenset(files.columns) - frozenset(declared), stream)


def _bounded(stream: Stream) -> dict[str, bool | int | float | str]:
    """Return the reader's options, with a limit on the size of a micro-batch."""
    if stream.format == "kafka":
        return {"maxOffsetsPerTrigger": _MOST_RECORDS} | stream.options
    if stream.path is not None and not {"maxFilesPerTrigger", "maxBytesPerTrigger"} & stream.options.keys():
        return {"maxBytesPerTrigger": _MOST_BYTES} | stream.options
    return stream.options
