"""Fetch the rows of a request from tables, in parallel and within the request's deadline.

Keys that are not in the node's cache are read once each, a hundred per request (BatchGetItem). Keys that the server
does not process now are read again while there is time. Rows that have not arrived by the deadline are marked as
unavailable, and the request does not wait for these rows.
"""

import asyncio
import logging
import random
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import xxhash

from shoal.engine.base.errors import ProcessIdTaken, ShoalError, TableFailed, TableInvalid
from shoal.engine.dynamodb.breaker import COUNTED_FROM_SECONDS, Breaker
from shoal.engine.dynamodb.cache import NO_ROW, RowCache
from shoal.engine.dynamodb.client import DynamoClient, binary, binary_of
from shoal.engine.dynamodb.items import KEY, VALUE, fingerprint, read_item, schema_in, schema_key
from shoal.engine.dynamodb.segments import segments_of, warm
from shoal.engine.format.schema import ViewSchema
from shoal.engine.lookup.key_columns import Entities, Hashes, Incomplete, KeyColumns
from shoal.engine.lookup.remote_rows import Fetched, FetchedRows
from shoal.engine.store.version import ViewVersion

log = logging.getLogger("shoal.remote")

BATCH = 100
"""The maximum number of keys in a BatchGetItem."""
_FIRST_PAUSE = 0.004
_LONGEST_PAUSE = 0.1
_TOLD_EVERY_SECONDS = 10.0
_CONNECT_AGAIN_SECONDS = 5.0
_END_SECONDS = 2.0
_HEDGED_SHARE = 0.05
"""The maximum share of requests that may be hedged. Without this limit, a table that is slow for all requests would get
twice the load."""
_MOST_HEDGES_AT_ONCE = 10.0


@dataclass
class FetchCounts:
    """Counts of the work of fetching the rows of one view.

    Keys are counted as found in the cache (`cached`), fetched from the table (`fetched`), not in the table (`absent`),
    or not arrived in time (`unavailable`). `requests` counts all requests, hedges included. `hedges` counts only the
    hedges. `seconds` is the duration of the fetch.
    """

    view: str
    cached: int = 0
    fetched: int = 0
    absent: int = 0
    unavailable: int = 0
    requests: int = 0
    hedges: int = 0
    seconds: float = 0.0


@dataclass
class _Asked:
    """The distinct keys that a request has in a view, and their values known so far. A value is that of a row, or
    NO_ROW."""

    view: ViewVersion
    keys: list[bytes]
    counts: FetchCounts
    known: dict[bytes, bytes] = field(default_factory=dict)
    fresh: dict[bytes, bytes] = field(default_factory=dict)
    schemas: dict[bytes, ViewSchema] = field(default_factory=dict)
    was_refused: bool = False


class RemoteTier:
    """A client that fetches rows from tables, in one event loop.

    Args:
        store: the node's store, which contains the cache.
        cache_seconds: how long rows may be served from the cache; 0 for no cache.
        cache_bytes: the maximum size of the cache.
        hedge_seconds: the time after which an unanswered request is sent once more (a hedge), as long as only few
            requests are hedged. None for no hedges.
    """

    def __init__(
        self,
        store: Path,
        *,
        cache_seconds: float = 0.0,
        cache_bytes: int = 256 << 20,
        hedge_seconds: float | None = None,
    ) -> None:
        self._store = store
        self._cache_seconds = cache_seconds
        self._cache_bytes = cache_bytes
        self._hedge_seconds = hedge_seconds
        self._hedges_left = _MOST_HEDGES_AT_ONCE
        self._client = DynamoClient()
        self._cache: RowCache | None = None
        self._filling = ThreadPoolExecutor(1, thread_name_prefix="row-cache")
        self._is_filling = False
        self._schemas: dict[tuple[str, bytes], ViewSchema] = {}
        self._connecting: asyncio.Future[None] | None = None
        self._connected_at = 0.0
        self._told_at: dict[str, float] = {}
        self._breakers: dict[str, Breaker] = {}

    async def connect(self) -> None:
        """Connect to the server and open the cache, unless this is already done. This takes a moment.

        Raises:
            TableClientMissing, TableFailed: the server cannot be found. The next call tries again, but at most once
                every few seconds.
        """
        before = self._connecting
        has_failed = before is not None and before.done() and before.exception() is not None
        if before is None or (has_failed and time.monotonic() - self._connected_at > _CONNECT_AGAIN_SECONDS):
            self._connected_at = time.monotonic()
            self._connecting = asyncio.ensure_future(self._connect())
        assert self._connecting is not None
        await asyncio.shield(self._connecting)

    async def _connect(self) -> None:
        await asyncio.to_thread(warm)
        await self._client.connect()
        if self._cache_seconds > 0 and self._cache is None:
            try:
                self._cache = await asyncio.to_thread(RowCache.open, self._store, self._cache_bytes)
            except (lmdb.Error, OSError, ProcessIdTaken) as error:
                log.warning("rows of tables are not cached: %s", error)

    async def close(self) -> None:
        """Close all connections."""
        await self._client.close()
        self._filling.shutdown(wait=False, cancel_futures=True)

    async def fetch(
        self, views: Sequence[ViewVersion], entities: Entities, incomplete: Incomplete, seconds: float
    ) -> tuple[Fetched, list[FetchCounts]]:
        """Return the rows that arrive within `seconds`, for a request's keys in some views, and the counts of each
        view.

        Raises:
            LookupInvalid: the entities do not fit the views.
            ViewDamaged: a table holds a value that is not a row.
        """
        started = time.monotonic()
        until = started + seconds
        columns = KeyColumns(entities, incomplete)
        asked = []
        rows = []
        for view in views:
            of_rows = _key_bytes(columns.hashes(view))
            distinct = [key for key in dict.fromkeys(of_rows) if key != _NOWHERE]
            asked.append(_Asked(view, distinct, FetchCounts(view.name)))
            rows.append(of_rows)
        await self._fill_in(asked, until)
        fetched = {}
        for of_view, of_rows in zip(asked, rows, strict=True):
            values = [value for value in of_view.known.values() if value]
            counts = of_view.counts
            counts.fetched = sum(1 for value in of_view.fresh.values() if value)
            counts.absent = len(of_view.fresh) - counts.fetched
            counts.unavailable = len(of_view.keys) - len(of_view.known)
            counts.seconds = time.monotonic() - started
            unavailable = None
            if counts.unavailable:
                missing = set(of_view.keys) - of_view.known.keys()
                unavailable = np.fromiter((key in missing for key in of_rows), np.bool_, len(of_rows))
            segments = segments_of(of_view.view.name, values, of_view.schemas.__getitem__)
            fetched[of_view.view.name] = FetchedRows(segments, unavailable)
        self._remember(asked)
        return fetched, [of_view.counts for of_view in asked]

    async def _fill_in(self, asked: Sequence[_Asked], until: float) -> None:
        """Read the values of all keys, from the cache and the tables."""
        started = time.monotonic()
        waited_for = list[_Asked]()
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + until - time.monotonic()):
                await self.connect()
                tasks = []
                for of_view in asked:
                    self._look_in_cache(of_view)
                    missing = [key for key in of_view.keys if key not in of_view.known]
                    if not missing or not self._breaker(of_view).may_ask():
                        continue
                    waited_for.append(of_view)
                    for start in range(0, len(missing), BATCH):
                        tasks.append(asyncio.ensure_future(self._read(of_view, missing[start : start + BATCH], until)))
                for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                    if isinstance(outcome, ShoalError):
                        self._tell(_kind(outcome), outcome)
                    elif isinstance(outcome, BaseException):
                        raise outcome
                for of_view in asked:
                    await self._learn_schemas(of_view, until)
        except TimeoutError:
            self._tell("late", f"rows of {', '.join(of_view.view.name for of_view in asked)} did not arrive in time")
        except ShoalError as error:
            self._tell(_kind(error), error)
        finally:
            self._note_outcomes(waited_for, time.monotonic() - started)
        for of_view in asked:
            for key in [key for key, value in of_view.known.items() if value and not self._knows(of_view, value)]:
                del of_view.known[key]

    def _breaker(self, of_view: _Asked) -> Breaker:
        table = of_view.view.record.view_schema.table_name
        breaker = self._breakers.get(table)
        if breaker is None:
            breaker = self._breakers[table] = Breaker(table)
        return breaker

    def _note_outcomes(self, waited_for: Sequence[_Asked], seconds: float) -> None:
        for of_view in waited_for:
            if of_view.fresh:
                self._breaker(of_view).answered()
            elif of_view.was_refused or seconds >= COUNTED_FROM_SECONDS:
                self._breaker(of_view).failed()
            else:
                self._breaker(of_view).given_up()

    def _knows(self, of_view: _Asked, value: bytes) -> bool:
        """Return whether the schema of a row is known."""
        schema_id = value[:8]
        if schema_id in of_view.schemas:
            return True
        schema = of_view.view.record.view_schema
        if schema_id != fingerprint(schema):
            known = self._schemas.get((schema.table_name, schema_id))
            if known is None:
                return False
            schema = known
        of_view.schemas[schema_id] = schema
        return True

    def _look_in_cache(self, of_view: _Asked) -> None:
        if self._cache is not None and of_view.keys:
            try:
                of_view.known = self._cache.get(self._prefix(of_view.view), of_view.keys)
            except lmdb.Error as error:
                self._tell("cache", f"the cache of rows cannot be read: {error}")
            of_view.counts.cached = len(of_view.known)

    async def _read(self, of_view: _Asked, keys: Sequence[bytes], until: float) -> None:
        """Read some keys from a table. If the server did not process some of the keys, read those keys again."""
        table = of_view.view.record.view_schema.table_name
        pause = _FIRST_PAUSE
        wanted: Any = {"Keys": [{KEY: binary(key)} for key in keys], "ProjectionExpression": VALUE}
        missing = set(keys)
        while missing:
            try:
                answer = await self._hedged(of_view.counts, {"RequestItems": {table: wanted}}, until)
            except TableFailed as error:
                of_view.was_refused |= error.code != "Timeout"
                if not error.is_transient:
                    raise
                self._tell(_kind(error), error)
            else:
                for item in answer.get("Responses", {}).get(table, ()):
                    if VALUE in item:
                        value = read_item(item)
                        key = value[8:24]
                        if key not in missing:
                            raise TableInvalid(f"table {table!r} returned a row of unrequested key {key.hex()!r}")
                        of_view.known[key] = of_view.fresh[key] = value
                left = answer.get("UnprocessedKeys", {}).get(table)
                refused = {_key_of(key) for key in left["Keys"]} if left else set()
                for key in missing - refused - of_view.known.keys():
                    of_view.known[key] = of_view.fresh[key] = NO_ROW
                missing &= refused
                if not missing:
                    return
                wanted = left | {"ProjectionExpression": VALUE}
            await asyncio.sleep(random.uniform(0, pause))
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _hedged(self, counts: FetchCounts, document: dict[str, Any], until: float) -> dict[str, Any]:
        """Return the response to an operation. If the response takes too long, send the operation once more (a hedge),
        and return the response that arrives first."""
        counts.requests += 1
        first = self._client.call("BatchGetItem", document, until - time.monotonic())
        if self._hedge_seconds is None:
            return await first
        self._hedges_left = min(self._hedges_left + _HEDGED_SHARE, _MOST_HEDGES_AT_ONCE)
        tasks = {asyncio.ensure_future(first)}
        try:
            done, _ = await asyncio.wait(tasks, timeout=self._hedge_seconds)
            if not done and self._hedges_left >= 1:
                self._hedges_left -= 1
                counts.hedges += 1
                counts.requests += 1
                tasks.add(asyncio.ensure_future(self._client.call("BatchGetItem", document, until - time.monotonic())))
            pending = set(tasks)
            while True:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                good = [task for task in done if task.exception() is None]
                if good or not pending:
                    return (good or list(done))[0].result()
        finally:
            for task in tasks:
                task.cancel()

    async def _learn_schemas(self, of_view: _Asked, until: float) -> None:
        """Read the schemas of rows that were written with a schema other than the view's own."""
        table = of_view.view.record.view_schema.table_name
        unknown = {value[:8] for value in of_view.known.values() if value and not self._knows(of_view, value)}
        for schema_id in unknown:
            document = {"TableName": table, "Key": {KEY: binary(schema_key(schema_id))}, "ConsistentRead": True}
            item = (await self._client.call("GetItem", document, until - time.monotonic())).get("Item")
            if item is None:
                raise TableInvalid(
                    f"table {table!r} has rows of schema {schema_id.hex()}, but no item that describes it"
                )
            self._schemas[table, schema_id] = schema_in(item, schema_id, table)

    def _remember(self, asked: Sequence[_Asked]) -> None:
        """Write fetched rows to the cache, in the background. Rows that arrive while an earlier write still runs are
        not cached."""
        cache = self._cache
        fresh = {self._prefix(of_view.view): of_view.fresh for of_view in asked if of_view.fresh}
        if cache is None or not fresh or self._is_filling:
            return
        self._is_filling = True

        def fill() -> None:
            try:
                for prefix, rows in fresh.items():
                    cache.put(prefix, rows, self._cache_seconds)
            except (lmdb.Error, OSError) as error:
                self._tell("cache", f"rows of tables are not cached: {error}")
            finally:
                self._is_filling = False

        self._filling.submit(fill)

    def _prefix(self, view: ViewVersion) -> bytes:
        """Return the prefix that the keys of a view's table have in the cache."""
        return xxhash.xxh3_64_digest(f"{self._client.endpoint} {view.record.view_schema.table_name}".encode())

    def _tell(self, kind: str, message: object) -> None:
        """Log a problem, but log each kind of problem only once every few seconds: while a table fails, every request
        fails."""
        now = time.monotonic()
        if now - self._told_at.get(kind, -_TOLD_EVERY_SECONDS) > _TOLD_EVERY_SECONDS:
            self._told_at[kind] = now
            log.warning("%s", message)


_NOWHERE = bytes(16)
"""The key that no row has (see `shoal.engine.lookup.key_columns`)."""


def _key_bytes(hashes: Hashes) -> list[bytes]:
    """Return the items' keys for the hashes of some join keys."""
    raw = np.ascontiguousarray(hashes.T).tobytes()
    return [raw[start : start + 16] for start in range(0, len(raw), 16)]


def _kind(error: ShoalError) -> str:
    return error.code if isinstance(error, TableFailed) else type(error).__name__


def _key_of(key: Mapping[str, Any]) -> bytes:
    return binary_of(key[KEY])


class BlockingTier:
    """A `RemoteTier` for blocking callers, in a thread with its own event loop."""

    def __init__(self, store: Path, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="remote-tier", daemon=True).start()
        self._tier = RemoteTier(store, **options)
        # Called when this object is garbage-collected, or when the process ends.
        weakref.finalize(self, _end, self._loop, self._tier)

    def fetch(
        self, views: Sequence[ViewVersion], entities: Entities, incomplete: Incomplete, seconds: float
    ) -> Fetched:
        """Fetch rows as `RemoteTier.fetch` does. The first call may wait longer, because it must first connect to the
        server."""

        async def fetch() -> Fetched:
            await self._tier.connect()
            return (await self._tier.fetch(views, entities, incomplete, seconds))[0]

        return asyncio.run_coroutine_threadsafe(fetch(), self._loop).result()


def _end(loop: asyncio.AbstractEventLoop, tier: RemoteTier) -> None:
    """Close the tier in the loop of its thread, and end the thread."""
    with suppress(TimeoutError):
        asyncio.run_coroutine_threadsafe(tier.close(), loop).result(_END_SECONDS)
    loop.call_soon_threadsafe(loop.stop)
