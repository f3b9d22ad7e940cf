"""Publish micro-batches to an export root. Each batch with rows is one entry of its view's log. The entry names the
batch.

Spark repeats a batch if the stream ended before Spark recorded it as done. The name in the entry shows that the batch
is already published: one entry makes the rows visible and records the batch.
"""

import uuid
from datetime import UTC, datetime
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import SparkSession

from shoal.engine.base.errors import LogTaken, SchemaChangeRefused
from shoal.engine.base.failpoints import reached
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.root.manifest import (
    EVENT_TIMESTAMP,
    TOMBSTONE,
    Manifest,
    PublishedFile,
    StreamBatch,
)
from shoal.spark_export.changes import entry_rows
from shoal.spark_export.changes.guard import Numbers
from shoal.spark_export.publication.opening import staging
from shoal.spark_export.publication.staging import Staging, job_name, write_errors_named
from shoal.spark_export.source.session import export_session
from shoal.spark_export.stream.batches import numbers_of
from shoal.spark_export.stream.consolidation import (
    Count,
    check_complete,
    entries_since_snapshot,
    remove_before,
    rows_of,
)
from shoal.spark_export.views.definition import ViewDefinition


class StreamLog:
    """The writer of one view's log for one stream."""

    def __init__(
        self, view: ViewDefinition, root: ExportRoot, spark: SparkSession, *, snapshot_every: int, take_over: bool
    ) -> None:
        """
        Args:
            snapshot_every: the number of deltas after which a snapshot of all rows is published; entries older than the
                previous snapshot are then removed.
            take_over: whether to continue a log that an export or another stream wrote.
        """
        self._view = view
        self._root = root
        self._spark = export_session(spark)
        self._job = job_name(spark)
        self._snapshot_every = snapshot_every
        self._take_over = take_over
        self._newest: Manifest | None = None
        self._is_read = False
        self._since_snapshot = 0

    def write(self, table: pa.Table, batch: StreamBatch) -> None:
        """Publish the rows of a batch, unless the batch is already published. `table` is as returned by
        `shoal.spark_export.stream.batches.collect`.

        Raises:
            LogTaken: an export or another stream published the newest entry.
            PublicationLost: another exporter or stream published the same seq first.
            SchemaChangeRefused: the view's features or join keys differ from those of the log.
            RootNotWritable: the root cannot be written.
        """
        if not self._is_read:
            self._read(batch)
        newest = self._newest
        if newest is not None and _batch_of(newest, batch.query) >= batch.batch:
            return
        if table.num_rows or newest is None:
            self._newest = _publish(self._view, self._root, newest, table, batch, self._job)
            self._since_snapshot += 1
        reached("stream.published")
        if self._newest is not None and self._since_snapshot >= self._snapshot_every:
            self._consolidate(self._newest)

    def _read(self, batch: StreamBatch) -> None:
        newest = _newest(self._root, self._view.name)
        if newest is not None:
            if newest.view.features != self._view.schema.features or newest.view.join_keys != self._view.join_keys:
                raise SchemaChangeRefused(
                    f"view {self._view.name!r}: its features or join keys differ from those of its log in "
                    f"{self._root}; a stream cannot publish older rows again; give the view another name"
                )
            if not (_batch_of(newest, batch.query) >= 0 or _is_definition(newest) or self._take_over):
                author = f"the stream {newest.stream.query}" if newest.stream else "an export"
                raise LogTaken(
                    f"view {self._view.name!r}: its newest entry, {newest.seq}, is of {author}, not of this stream, "
                    f"{batch.query}; end the other publisher and start this stream once with --take-over, or use the "
                    f"checkpoint of the other stream"
                )
            with write_errors_named(self._root):
                self._root.finish(newest)
            self._since_snapshot = len(entries_since_snapshot(self._root, newest)) - 1
        self._newest = newest
        self._is_read = True

    def _consolidate(self, newest: Manifest) -> None:
        """Publish all rows of the log as a snapshot, and remove the entries older than the previous snapshot."""
        entries = entries_since_snapshot(self._root, newest)
        count = Count(self._view)
        with staging(self._root, self._view.name, uuid.uuid4().hex, newest.seq + 1) as stage:
            rows = rows_of(self._view, self._root, entries, self._spark)
            rows = count.of(entry_rows.in_files(self._view, rows, duplicates=False))
            files = stage.write_parts("snapshot", rows)
            numbers = count.numbers()
            check_complete(self._root, entries, numbers.rows)
            self._newest = _publish_files(
                self._root, stage, self._view, newest, newest.stream, self._job, "snapshot", files, None, numbers
            )
        self._since_snapshot = 0
        reached("stream.consolidated")
        remove_before(self._root, self._view.name, entries[-1].seq)


def publish_definition(view: ViewDefinition, root: ExportRoot, job: str) -> None:
    """Publish a snapshot without rows if a view has no log. Nodes then know the view and accept pushes to it."""
    if _newest(root, view.name) is None:
        _publish(view, root, None, pa.table({}), None, job)


def _newest(root: ExportRoot, view: str) -> Manifest | None:
    published = root.sequence_numbers(view)
    if not published:
        return None
    root.check_not_dropped(view, published[-1])
    return root.entry(view, published[-1])


def _batch_of(manifest: Manifest, query: str) -> int:
    """Return the number of an entry's batch; -1 if the entry is not of this query."""
    return manifest.stream.batch if manifest.stream and manifest.stream.query == query else -1


def _is_definition(manifest: Manifest) -> bool:
    return manifest.parent is None and not manifest.rows and manifest.stream is None


def _publish(
    view: ViewDefinition,
    root: ExportRoot,
    previous: Manifest | None,
    table: pa.Table,
    batch: StreamBatch | None,
    job: str,
) -> Manifest:
    """Publish rows as the entry after `previous`. The first entry of a log is a snapshot."""
    kind: Literal["snapshot", "delta"] = "delta" if previous else "snapshot"
    newest = pc.max(table[EVENT_TIMESTAMP]).as_py() if table.num_rows else None
    if kind == "delta":
        table = table.append_column(TOMBSTONE, pa.array(np.zeros(table.num_rows, np.bool_)))
    seq = previous.seq + 1 if previous else root.first_seq(view.name)
    with staging(root, view.name, uuid.uuid4().hex, seq) as stage:
        with write_errors_named(root):
            files = stage.write_table(kind, table)
        numbers = numbers_of(view, table) if kind == "snapshot" else None
        return _publish_files(root, stage, view, previous, batch, job, kind, files, newest, numbers)


def _publish_files(
    root: ExportRoot,
    stage: Staging,
    view: ViewDefinition,
    previous: Manifest | None,
    batch: StreamBatch | None,
    job: str,
    kind: Literal["snapshot", "delta"],
    files: tuple[PublishedFile, ...],
    newest: datetime | None,
    numbers: Numbers | None,
) -> Manifest:
    """Publish written files as the entry after `previous`.

    `newest` is the newest event time in the files. `numbers` are the counts of a snapshot; None for a delta, because
    the number of rows in the view after a delta is not known.
    """
    seen = (newest, previous.watermark if previous else None)
    manifest = Manifest(
        format_version=root.write_format,
        kind=kind,
        id=stage.run,
        seq=previous.seq + 1 if previous else root.first_seq(view.name),
        parent=previous.id if previous else None,
        view=view.schema,
        rows=sum(file.rows for file in files),
        tombstones=0,
        files=files,
        watermark=max((moment for moment in seen if moment), default=None),
        published_at=datetime.now(UTC),
        job=job,
        inputs=(str(view.stream),),
        stream=batch,
        live_rows=numbers.rows if numbers else None,
        values=dict(numbers.values) if numbers and numbers.values is not None else None,
    )
    stage.publish(manifest)
    return manifest
