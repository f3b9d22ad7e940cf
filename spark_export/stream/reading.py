"""Open a view's stream: the events as Spark reads them, and the query over them."""

from datetime import timedelta
from typing import cast

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import StructType

from engine.errors import SourceError
from spark_export.partition_texts import read_as_declared
from spark_export.source import file_uri, fit, hint_of
from spark_export.spark_errors import raised_as
from spark_export.views import Stream, ViewDefinition

EVENTS = "events"
"""The table that a stream's query reads."""

_MOST_RECORDS = 100_000
_MOST_BYTES = 64 << 20
"""How much a micro-batch takes from Kafka, and from files, where the options say nothing: the driver holds it."""

_KAFKA_VALUE = "value"
_MILLISECOND = timedelta(milliseconds=1)


def open_stream(view: ViewDefinition, spark: SparkSession) -> DataFrame:
    """A view's rows as `spark_export.source.fit` gives them, streaming. `spark` is a session of this stream alone, in
    which `events` is defined.

    Raises:
        SourceError: Spark cannot read it, or a column is missing or of a type that does not fit.
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
        return fit(view, events, 0, stream)


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
    # Columns that the files do not declare are names of directories.
    declared = cast("StructType", StructType.fromDDL(stream.columns)).fieldNames()
    return read_as_declared(view, files, frozenset(files.columns) - frozenset(declared), stream)


def _bounded(stream: Stream) -> dict[str, bool | int | float | str]:
    """The reader's options, with a bound on what one micro-batch takes."""
    if stream.format == "kafka":
        return {"maxOffsetsPerTrigger": _MOST_RECORDS} | stream.options
    if stream.path is not None and not {"maxFilesPerTrigger", "maxBytesPerTrigger"} & stream.options.keys():
        return {"maxBytesPerTrigger": _MOST_BYTES} | stream.options
    return stream.options
