"""Run streams until they are stopped, all events are read, or one stream fails."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.streaming.query import StreamingQuery

from shoal.engine.base.errors import ShoalError, StreamFailed
from shoal.engine.root.manifest import EVENT_TIMESTAMP, StreamBatch
from shoal.spark_export.source.session import export_session
from shoal.spark_export.source.spark_errors import SPARK_ERRORS, brief, raised_as
from shoal.spark_export.stream.batches import collect
from shoal.spark_export.stream.reading import open_stream
from shoal.spark_export.views.definition import ViewDefinition

_QUERY_ID = "sql.streaming.queryId"
_LOOK_SECONDS = 0.1


class Sink(Protocol):
    """The destination of one view's batches."""

    def write(self, table: pa.Table, batch: StreamBatch) -> None:
        """Make the whole batch visible, unless it is already visible. Spark repeats a batch that it did not record as
        done."""


@dataclass(frozen=True)
class BatchReport:
    """The result of one batch. `rows` is the number of written rows, `newest_seconds_ago` the age of the newest row
    when it was written, `seconds` the duration of the batch."""

    view: str
    batch: int
    rows: int
    newest_seconds_ago: float | None
    seconds: float


class Streams:
    """The running streams of several views. Each has its own query and checkpoint."""

    def __init__(self, spark: SparkSession, checkpoint: str, report: Callable[[BatchReport], None]) -> None:
        """
        Args:
            checkpoint: a directory, or its URI on a file system that Spark knows.
            report: called after each batch with rows.
        """
        self._spark = spark
        self._checkpoint = checkpoint
        self._report = report
        self._queries: dict[str, StreamingQuery] = {}
        self._failures: dict[str, ShoalError] = {}

    def run(
        self,
        sinks: Sequence[tuple[ViewDefinition, Sink]],
        *,
        every_seconds: float,
        once: bool,
        stopped: threading.Event,
    ) -> None:
        """Run the streams of these views.

        Args:
            every_seconds: the interval between starts of batches; after a batch that takes longer, the next batch
                starts at once.
            once: end when the events that exist now have been read.
            stopped: ends all streams when set; also set when this method ends.

        Raises:
            SourceError: a stream cannot be read, or an event cannot be published.
            StreamFailed: Spark failed, or a server rejects rows.
            LogTaken, PublicationLost, SchemaChangeRefused, RootNotWritable: see `StreamLog.write`.
        """
        trigger: dict[str, Any] = (
            {"availableNow": True} if once else {"processingTime": f"{int(every_seconds * 1000)} milliseconds"}
        )
        try:
            for view, sink in sinks:
                self._start(view, sink, trigger)
            while not stopped.wait(_LOOK_SECONDS) and not self._has_ended():
                pass
            if not stopped.is_set():
                self._raise_failure()
        finally:
            stopped.set()
            for query in self._queries.values():
                query.stop()

    def _start(self, view: ViewDefinition, sink: Sink, trigger: dict[str, Any]) -> None:
        session = export_session(self._spark)
        # Spark fixes the number of partitions of a query's state when it creates the checkpoint.
        session.conf.set("spark.sql.shuffle.partitions", str(view.shards))
        assert view.stream is not None
        rows = open_stream(view, session)
        writer = rows.writeStream.queryName(view.name).outputMode(view.stream.output).trigger(**trigger)
        writer = writer.option("checkpointLocation", f"{self._checkpoint}/{view.name}")
        with raised_as(StreamFailed, f"view {view.name!r}: its {view.stream} does not start"):
            self._queries[view.name] = writer.foreachBatch(
                lambda batch, number: self._write(view, sink, batch, number)
            ).start()

    def _write(self, view: ViewDefinition, sink: Sink, rows: DataFrame, number: int) -> None:
        started = time.monotonic()
        try:
            query = rows.sparkSession.sparkContext.getLocalProperty(_QUERY_ID)
            assert query is not None
            table = collect(view, rows)
            sink.write(table, StreamBatch(query=query, batch=number))
        except ShoalError as error:
            # Keep the error here, because Spark returns only the text of its traceback.
            self._failures[view.name] = error
            raise
        if table.num_rows:
            newest = pc.max(table[EVENT_TIMESTAMP]).as_py()
            ago = max(0.0, (datetime.now(UTC) - newest).total_seconds())
            self._report(BatchReport(view.name, number, table.num_rows, ago, round(time.monotonic() - started, 3)))

    def _has_ended(self) -> bool:
        """Return whether a stream has failed or all streams are done."""
        running = [query.isActive for query in self._queries.values()]
        return not any(running) or bool(self._failures) or self._failed() is not None

    def _failed(self) -> tuple[str, Exception] | None:
        for name, query in self._queries.items():
            if not query.isActive and (error := query.exception()) is not None:
                return name, error
        return None

    def _raise_failure(self) -> None:
        for error in self._failures.values():
            raise error
        if (failed := self._failed()) is not None:
            name, cause = failed
            said = brief(cause) if isinstance(cause, SPARK_ERRORS) else str(cause)
            raise StreamFailed(f"view {name!r}: its stream failed in Spark: {said}") from cause
