"""The two ways in which Feast's online store writes: through the store's server, or directly as the store's only
writer."""

import asyncio
import time
from collections.abc import Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from shoal.engine.base.errors import StoreLocked, WriterUnavailable
from shoal.engine.feature_store import FeatureStore
from shoal.engine.format.schema import ViewSchema
from shoal.engine.process.control import WriterClient
from shoal.engine.push.pushed_rows import pushed_rows
from shoal.engine.store.version import StoreVersion
from shoal.loaders.apply.compaction import fold, should_fold
from shoal.loaders.apply.definition import define_view, drop_view
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.push.push import push_rows

_PATIENCE_SECONDS = 60.0
_POLL_SECONDS = 0.02


class Writing(Protocol):
    """The operations on a store that is open for writing. `is_alone` is False if a server performs them."""

    is_alone: bool

    def version(self) -> StoreVersion:
        """Return the newest version of the store."""

    def define(self, schema: ViewSchema) -> None:
        """Create the view of a schema, or change it to the schema."""

    def drop(self, view: str) -> None:
        """Remove a view."""

    def push(self, view: str, columns: Mapping[str, Any]) -> None:
        """Write rows."""

    def settle(self, view: str) -> None:
        """Finish after the last push of a batch: fold the view's overlays if needed."""


@contextmanager
def open_writer(store: Path) -> Iterator[Writing]:
    """Open a store for writing: through its server if one runs, otherwise as its only writer.

    Without a server, wait until no other process is writing.

    Raises:
        StoreLocked: another process, which is not a server, kept the store locked for a minute.
    """
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            writer = StoreWriter(store)
        except StoreLocked:
            if _server_answers(store):
                yield _Server(store)
                return
            if time.monotonic() > deadline:
                raise
            time.sleep(_POLL_SECONDS)
        else:
            with writer:
                yield _ExclusiveWriter(writer)
            return


def _server_answers(store: Path) -> bool:
    try:
        _run(WriterClient(store).status())
    except WriterUnavailable:
        return False
    return True


def _run(asking: Coroutine[Any, Any, Any]) -> None:
    """Run a coroutine to its end, even if the caller's thread already runs an event loop."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, asking).result()


class _ExclusiveWriter:
    """Writes to the store as its only writer."""

    is_alone = True

    def __init__(self, writer: StoreWriter) -> None:
        self._writer = writer

    def version(self) -> StoreVersion:
        return self._writer.version()

    def define(self, schema: ViewSchema) -> None:
        define_view(self._writer, schema)

    def drop(self, view: str) -> None:
        drop_view(self._writer, view)

    def push(self, view: str, columns: Mapping[str, Any]) -> None:
        push_rows(self._writer, view, columns)

    def settle(self, view: str) -> None:
        """Fold the view's overlays if needed, because no server folds them."""
        record = self._writer.record(view)
        if record is not None and should_fold(record):
            fold(self._writer, view)


class _Server:
    """Writes to the store through the writer of a running server."""

    is_alone = False

    def __init__(self, store: Path) -> None:
        self._reader = FeatureStore.open(store)
        self._client = WriterClient(store)

    def version(self) -> StoreVersion:
        return self._reader.version()

    def define(self, schema: ViewSchema) -> None:
        _run(self._client.define_view(schema))

    def drop(self, view: str) -> None:
        _run(self._client.drop_view(view))

    def push(self, view: str, columns: Mapping[str, Any]) -> None:
        rows = pushed_rows(self.version().view(view), columns, now=datetime.now(UTC))
        _run(self._client.push(view, [rows]))

    def settle(self, view: str) -> None:
        pass
