"""A worker's access to the tables of a store. The table client is imported only if a view is kept in a table."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from shoal.engine.base.errors import ShoalError
from shoal.engine.lookup.columns import remote_views
from shoal.engine.lookup.key_columns import Incomplete
from shoal.engine.lookup.remote_rows import Fetched, Partial, check_partial
from shoal.engine.server.metrics import Metrics
from shoal.engine.server.served_store import ServedStore
from shoal.engine.server.settings import ServerSettings

if TYPE_CHECKING:
    from shoal.engine.dynamodb.tier import RemoteTier

log = logging.getLogger("shoal.worker")

PARTIAL_HEADER = "X-Shoal-Partial"
"""In a request: what to do if rows do not arrive in time (`serve` or `fail`). In an answer: the views with missing
rows."""
_SHARE = 0.9
"""The share of a request's remaining time that may be spent on waiting for tables."""


def parse_partial(text: str | None) -> Partial:
    """Return the value of a request's X-Shoal-Partial header; raise LookupInvalid if it is not valid."""
    partial = cast(Partial, "serve" if text is None else text.strip().lower())
    check_partial(partial)
    return partial


class ServedTables:
    """The fetcher of rows from tables, in a worker's event loop."""

    def __init__(self, settings: ServerSettings, served: ServedStore, metrics: Metrics) -> None:
        self._settings = settings
        self._served = served
        self._metrics = metrics
        self._tier: RemoteTier | None = None

    def are_needed(self) -> bool:
        """Return whether the store has views that are kept in tables."""
        version = self._served.version()
        return version is not None and version.has_remote_views

    async def prepare(self) -> None:
        """Connect to the tables' server if views are kept in tables, so that the first request need not wait for the
        connection. Call this regularly, because such a view may be added later."""
        if self.are_needed():
            with suppress(ShoalError):
                await self._opened().connect()

    async def fetch(
        self,
        wanted: str | Sequence[str],
        entities: Mapping[str, Any],
        incomplete: Incomplete,
        remaining: float | None,
    ) -> Fetched:
        """Return the rows of a request that are kept in tables, if they arrive in time.

        Args:
            remaining: the seconds until the request's deadline; None if the client set none.

        Raises:
            LookupInvalid, UnknownFeature: the request does not fit the store.
        """
        views = remote_views(self._served.open().version(), wanted)
        if not views:
            return {}
        seconds = self._settings.remote_timeout_ms / 1e3 if remaining is None else max(0.0, _SHARE * remaining)
        fetched, counts = await self._opened().fetch(views, entities, incomplete, seconds)
        for of_view in counts:
            self._metrics.count_fetch(of_view)
        return fetched

    async def close(self) -> None:
        """Close all connections to tables."""
        if self._tier is not None:
            await self._tier.close()

    def _opened(self) -> "RemoteTier":
        if self._tier is None:
            from shoal.engine.dynamodb.tier import RemoteTier

            settings = self._settings
            self._tier = RemoteTier(
                settings.store,
                cache_seconds=settings.remote_cache_seconds,
                cache_bytes=settings.remote_cache_mib << 20,
                hedge_seconds=settings.remote_hedge_ms / 1e3 or None,
            )
        return self._tier
