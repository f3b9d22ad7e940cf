"""The two ways in which Feast's online store writes: through the server of a store, or as its writer for a while."""

import asyncio
import time
from collections.abc import Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from engine.control import WriterClient
from engine.errors import StoreLocked, WriterUnavailable
from engine.feature_store import FeatureStore
from engine.pushed_rows import pushed_rows
from engine.schema import ViewSchema
from engine.version import StoreVersion
from loaders.compaction import fold, should_fold
from loaders.definition import define_view, drop_view
from loaders.push import push_rows
from loaders.store_writer import StoreWriter

_PATIENCE_SECONDS = 60.0
_POLL_SECONDS = 0.02


class Writing(Protocol):
    """What can be done to a store while it is written; `is_alone` unless a server does it."""

    is_alone: bool

    def version(self) -> StoreVersion:
        """The newest version."""

    def define(self, schema: ViewSchema) -> None:
        """Have a view of this schema."""

    def drop(self, view: str) -> None:
        """Remove a view."""

    def push(self, view: str, columns: Mapping[str, Any]) -> None:
        """Write rows."""

    def settle(self, view: str) -> None:
        """All rows for now are written."""


@contextmanager
def writing(store: Path) -> Iterator[Writing]:
    """Write to a store, through its server if one runs, and else alone; who writes alone waits for others that do.

    Raises:
        StoreLocked: another process that is no server wrote for a minute.
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
                yield _Alone(writer)
            return


def _server_answers(store: Path) -> bool:
    try:
        _run(WriterClient(store).status())
    except WriterUnavailable:
        return False
    return True


def _run(asking: Coroutine[Any, Any, Any]) -> None:
    """Run a coroutine to its end, also where the caller's thread has an event loop that runs already."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, asking).result()


class _Alone:
    """Writing as the store's only writer."""

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
        """No server folds the view's overlays: whoever wrote last does."""
        record = self._writer.record(view)
        if record is not None and should_fold(record):
            fold(self._writer, view)


class _Server:
    """Writing through the writer of a running server."""

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
