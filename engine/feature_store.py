"""Open a store in this process, and look up features, always in the newest version of the store."""

import os
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from shoal.engine.base.errors import StoreClosed, StoreMoved
from shoal.engine.format.schema import ViewSchema
from shoal.engine.lookup import columns as _lookup
from shoal.engine.lookup import matrix as _matrix_lookup
from shoal.engine.lookup.arguments import as_entities, check_max_age
from shoal.engine.lookup.columns import Stale
from shoal.engine.lookup.key_columns import Entities, Incomplete
from shoal.engine.lookup.remote_rows import Fetched, Partial
from shoal.engine.lookup.result import LookupResult, MatrixResult
from shoal.engine.store.background_refresh import refresh_in_background, stop_refreshing
from shoal.engine.store.environment import LiveEnvironment, open_live
from shoal.engine.store.open_version import read_version
from shoal.engine.store.version import StoreVersion

if TYPE_CHECKING:
    from shoal.engine.dynamodb.tier import BlockingTier

_RETRY_SECONDS = 1.0
REMOTE_SECONDS = 1.0
"""The default wait of an in-process lookup for rows from tables. A server has its own setting."""


class FeatureStore:
    """A store open for lookups, from any number of threads.

    Every lookup runs on the newest version that is committed when the lookup starts, and on that version alone. If the
    data of a view is damaged, lookups use the last data of this view that the process could read, until the view can be
    read again. If there is no such data, lookups fail. A store must not be used across a fork: open it in the child.
    """

    def __init__(self, path: Path, live: LiveEnvironment) -> None:
        self.path = path
        self.remote_options: dict[str, Any] = {}
        self._remote: BlockingTier | None = None
        self._refreshing = threading.Lock()
        self._version: StoreVersion | None = self._read(live, None)

    @classmethod
    def open(cls, path: str | os.PathLike[str], **remote_options: Any) -> Self:
        """Open the store in a directory.

        Args:
            remote_options: for views that are kept in tables: `cache_seconds`, `cache_bytes` and `hedge_seconds` (see
                `shoal.engine.dynamodb.tier.RemoteTier`).

        Raises:
            StoreNotFound: the directory contains no store.
            StoreDamaged: nothing in the store can be read. If only some views are damaged, the store opens.
            StoreUnreadable: the operating system does not let the store be read now.
        """
        store = Path(path)
        opened = cls(store, open_live(store))
        opened.remote_options = remote_options
        refresh_in_background(opened)
        return opened

    def __repr__(self) -> str:
        return f"{type(self).__name__}.open({str(self.path)!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the store; later lookups raise StoreClosed. Results stay valid, and running lookups of other threads
        finish. A second call does nothing."""
        stop_refreshing(self)
        with self._refreshing:
            self._version = self._remote = None

    def views(self) -> dict[str, ViewSchema]:
        """Return the schemas of the views that can be looked up now, by name: join keys and features, with types."""
        return {name: view.record.view_schema for name, view in sorted(self.version().views.items())}

    def lookup(
        self,
        features: str | Sequence[str],
        entities: Entities,
        *,
        max_age: timedelta | None = None,
        stale: Stale = "null",
        incomplete: Incomplete = "fail",
        max_values: int | None = None,
        max_bytes: int | None = None,
        fetched: Fetched | None = None,
        partial: Partial = "serve",
        remote_timeout: float = REMOTE_SECONDS,
    ) -> LookupResult:
        """Look up features of many keys.

        Args:
            features: a list of `view:feature` (`view:*` for all of a view), or the name of a feature service.
            entities: join key → list of values, or a scalar for all rows; or a DataFrame or Arrow table with one column
                per join key.
            max_age: the accepted age of a row, instead of each view's TTL.
            stale: how to treat older rows: "serve" them, "null" their values, or "fail" the lookup.
            incomplete: how to treat keys with a part that is null or missing: "fail" the lookup, or treat them as
                "not_found".
            max_values: the maximum number of values in the answer, keys times features; no limit if None.
            max_bytes: the maximum size of the answer in memory, in bytes; no limit if None.
            fetched: the rows of views that are kept in tables, if they are already fetched.
            partial: what to do if rows from tables do not arrive in time: "serve" the other rows and give the late rows
                the status UNAVAILABLE, or "fail" the lookup.
            remote_timeout: how many seconds to wait for rows from tables.

        Raises:
            LookupInvalid, UnknownFeature: the request does not fit the store.
            KeyOutsideShard: the store is a shard, and some keys belong to another shard.
            RequestTooLarge: the request exceeds the limit on values, bytes or features.
            ViewDamaged: the data of a requested view cannot be read.
            StaleFeatures: rows are older than accepted, and `stale` is "fail".
            RowsUnavailable: rows did not arrive in time, and `partial` is "fail".
            TableFailed, TableClientMissing: tables cannot be read at all.
            StoreClosed: `close` was called.
        """
        entities = as_entities(entities)
        if max_age is not None:
            check_max_age(max_age)
        now = time.time_ns() // 1000
        version = self.version()
        if fetched is None and version.has_remote_views:
            fetched = self._fetch(version, features, entities, incomplete, remote_timeout)
            version = self.version()
        return _lookup.lookup(
            version,
            features,
            entities,
            now=now,
            max_age=max_age,
            stale=stale,
            incomplete=incomplete,
            max_values=max_values,
            max_bytes=max_bytes,
            fetched=fetched,
            partial=partial,
        )

    def lookup_matrix(
        self,
        features: str | Sequence[str],
        entities: Entities,
        *,
        max_age: timedelta | None = None,
        stale: Stale = "null",
        max_values: int | None = None,
        max_bytes: int | None = None,
        fetched: Fetched | None = None,
        partial: Partial = "serve",
        remote_timeout: float = REMOTE_SECONDS,
    ) -> MatrixResult:
        """Look up numeric features of many keys directly into one matrix. This is faster than `lookup` followed by
        `to_numpy`.

        Arguments and errors are those of `lookup`; LookupInvalid is also raised if a feature is not numeric. The matrix
        is float32 if float32 can hold all requested types exactly, and float64 otherwise.
        """
        entities = as_entities(entities)
        if max_age is not None:
            check_max_age(max_age)
        now = time.time_ns() // 1000
        version = self.version()
        if fetched is None and version.has_remote_views:
            fetched = self._fetch(version, features, entities, "fail", remote_timeout)
            version = self.version()
        return _matrix_lookup.lookup_matrix(
            version,
            features,
            entities,
            now=now,
            max_age=max_age,
            stale=stale,
            max_values=max_values,
            max_bytes=max_bytes,
            fetched=fetched,
            partial=partial,
        )

    def _fetch(
        self,
        version: StoreVersion,
        features: str | Sequence[str],
        entities: Entities,
        incomplete: Incomplete,
        seconds: float,
    ) -> Fetched | None:
        """Return the rows of a request from tables; None if the request has no views in tables."""
        views = _lookup.remote_views(version, features)
        if not views:
            return None
        if self._remote is None:
            with self._refreshing:
                if self._remote is None:
                    # Imported only here: a process without views in tables should not pay for this import.
                    from shoal.engine.dynamodb.tier import BlockingTier

                    self._remote = BlockingTier(self.path, **self.remote_options)
        return self._remote.fetch(views, entities, incomplete, seconds)

    def version(self) -> StoreVersion:
        """Return the newest committed version; raise StoreClosed if the store was closed."""
        version = self._version
        if version is not None and self._is_newest(version):
            return version
        with self._refreshing:
            if self._version is None:
                raise StoreClosed(f"the store at {self.path} was closed; open it again, or close it later")
            if not self._is_newest(self._version):
                self._version = self._read(self._version.live, self._version)
            return self._version

    def check_in_place(self) -> None:
        """Raise StoreMoved if the store's path no longer leads to the files that lookups read."""
        while True:
            live = self.version().live
            try:
                return live.check_in_place(self.path)
            except StoreMoved:
                # The files may have been replaced and removed during the check.
                if self.version().live is live:
                    raise

    def _is_newest(self, version: StoreVersion) -> bool:
        """Return whether there is nothing new to read. A damaged view is read again after a while, because the view may
        be repaired without a commit."""
        retry = version.damaged and time.monotonic() > self._retry_at
        return version.is_newest and not retry

    def _read(self, live: LiveEnvironment, previous: StoreVersion | None) -> StoreVersion:
        while True:
            version = read_version(self.path, live, previous)
            # A generation may be removed while its version is being opened, if a newer version was committed.
            if not version.damaged or version.is_newest:
                self._retry_at = time.monotonic() + _RETRY_SECONDS
                return version
