"""Run streams until they are told to stop, have read all there is, or one of them fails."""

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

from engine.errors import ShoalError, StreamFailed
from engine.manifest import EVENT_TIMESTAMP, StreamBatch
from spark_export.session import export_session
from spark_export.spark_errors import SPARK_ERRORS, brief, raised_as
from spark_export.stream.batches import collect
from spark_export.stream.reading import open_stream
from spark_export.views import ViewDefinition

_QUERY_ID = "sql.streaming.queryId"
_LOOK_SECONDS = 0.1


class Sink(Protocol):
    """Where the batches of one view go."""

    def write(self, table: pa.Table, batch: StreamBatch) -> None:
        """Make a batch visible, all of it, unless it is: Spark gives a batch again that it did not note as done."""


@dataclass(frozen=True)
class BatchReport:
    """What became of one batch: how many rows were written, how old the newest was then, and how long it took."""

    view: str
    batch: int
    rows: int
    newest_seconds_ago: float | None
    seconds: float


class Streams:
    """Streams of several views, each with a query and a checkpoint of its own."""

    def __init__(self, spark: SparkSession, checkpoint: str, report: Callable[[BatchReport], None]) -> None:
        """`checkpoint` is a directory, or its URI on a file system that Spark knows."""
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
            every_seconds: how often a batch begins; one that takes longer is followed by the next at once.
            once: end when what is there now has been read.
            stopped: ends all when it is set; it is set when this ends.

        Raises:
            SourceError: a stream cannot be read, or an event cannot be published.
            StreamFailed: Spark gave up, or a server refuses rows.
            LogTaken, PublicationLost, SchemaChangeRefused, RootNotWritable: as `StreamLog.write` raises them.
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
        # Spark keeps what a query remembers in as many parts as there are when its checkpoint is made.
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
            # Through Spark it comes back as the text of a traceback.
            self._failures[view.name] = error
            raise
        if table.num_rows:
            newest = pc.max(table[EVENT_TIMESTAMP]).as_py()
            ago = max(0.0, (datetime.now(UTC) - newest).total_seconds())
            self._report(BatchReport(view.name, number, table.num_rows, ago, round(time.monotonic() - started, 3)))

    def _has_ended(self) -> bool:
        """Whether there is nothing more to wait for: one failed, or all are done."""
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
            raise StreamFailed(f"view {name!r}: Spark gave up on its stream: {said}") from cause
