"""The tables of a store as a worker reads them: nothing of it is loaded unless there is a view that is kept in one."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from engine.errors import ShoalError
from engine.key_columns import Incomplete
from engine.lookup import remote_views
from engine.remote_rows import Fetched, Partial, check_partial
from engine.server.metrics import Metrics
from engine.server.served_store import ServedStore
from engine.settings import ServerSettings

if TYPE_CHECKING:
    from engine.dynamodb.tier import RemoteTier

log = logging.getLogger("shoal.worker")

PARTIAL_HEADER = "X-Shoal-Partial"
"""In a request: whether an answer may lack rows (`serve`, or `fail`). In an answer: the views of which it does."""
_SHARE = 0.9
"""What of the time that a client waits still may be spent waiting for tables."""


def parse_partial(text: str | None) -> Partial:
    """What a client says of answers that lack rows; raises LookupInvalid."""
    partial = cast(Partial, "serve" if text is None else text.strip().lower())
    check_partial(partial)
    return partial


class ServedTables:
    """Fetches the rows of requests in a worker's event loop."""

    def __init__(self, settings: ServerSettings, served: ServedStore, metrics: Metrics) -> None:
        self._settings = settings
        self._served = served
        self._metrics = metrics
        self._tier: RemoteTier | None = None

    def are_needed(self) -> bool:
        """Whether the store has views that are kept in tables."""
        version = self._served.version()
        return version is not None and version.has_remote_views

    async def prepare(self) -> None:
        """If there are such views, find their server, lest the first request waits for that; to be called again and
        again, since such a view may come."""
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
        """The rows of a request that are kept in tables, as far as they come in time.

        Args:
            remaining: how many seconds the client waits still, if it has said so.

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
            from engine.dynamodb.tier import RemoteTier

            settings = self._settings
            self._tier = RemoteTier(
                settings.store,
                cache_seconds=settings.remote_cache_seconds,
                cache_bytes=settings.remote_cache_mib << 20,
                hedge_seconds=settings.remote_hedge_ms / 1e3 or None,
            )
        return self._tier
