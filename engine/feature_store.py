"""The store as a process uses it: open it, look up, always in its newest version."""

import os
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from engine import lookup as _lookup
from engine import matrix_lookup as _matrix_lookup
from engine.arguments import as_entities, check_max_age
from engine.environment import LiveEnvironment, open_live
from engine.errors import StoreClosed, StoreMoved
from engine.keeping_up import keep_up, leave_alone
from engine.key_columns import Entities, Incomplete
from engine.lookup import Stale
from engine.reading import read_version
from engine.remote_rows import Fetched, Partial
from engine.result import LookupResult, MatrixResult
from engine.schema import ViewSchema
from engine.version import StoreVersion

if TYPE_CHECKING:
    from engine.dynamodb.tier import BlockingTier

_RETRY_SECONDS = 1.0
REMOTE_SECONDS = 1.0
"""How long a lookup in process waits for rows from tables, unless it is told. A server's default is its settings'."""


class FeatureStore:
    """A store open for lookups, from any number of threads.

    Every lookup runs on the newest version that is committed when it starts, and on that version alone. A view whose
    data is damaged is looked up as this process could read it last, or not at all, until it can be read again. A store
    must not be carried over a fork: open it in the child.
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
            remote_options: of views that are kept in tables: `cache_seconds`, `cache_bytes` and `hedge_seconds`, as
                `engine.dynamodb.tier.RemoteTier` has them.

        Raises:
            StoreNotFound: there is none.
            StoreDamaged: none of it can be read. Where a view cannot, it opens.
            StoreUnreadable: the system does not let it be read now.
        """
        store = Path(path)
        opened = cls(store, open_live(store))
        opened.remote_options = remote_options
        keep_up(opened)
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
        leave_alone(self)
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
            entities: join key → list of values, or a scalar that holds for every row; or a DataFrame, or a table of
                Arrow, with a column for each join key.
            max_age: the age of a row that is accepted, instead of each view's TTL.
            stale: how to treat older rows: "serve" them, "null" their values, or "fail" the lookup.
            incomplete: how to treat keys with a part that is null or missing: "fail" the lookup, or treat them as
                "not_found".
            max_values: the most values, keys times features, that the answer may hold; any number if None.
            max_bytes: the most bytes that the answer may take in memory; any number if None.
            fetched: the rows of views that are kept in tables, if they were fetched already.
            partial: what to do if rows from tables do not arrive in time: "serve" the other rows and give these the
                status UNAVAILABLE, or "fail" the lookup.
            remote_timeout: how many seconds to wait for rows from tables.

        Raises:
            LookupInvalid, UnknownFeature: the request does not fit the store.
            KeyOutsideShard: the store is a shard, and keys belong to another.
            RequestTooLarge: it asks for more values or bytes, or for more features than any request may.
            ViewDamaged: the data of a view that is asked for cannot be read.
            StaleFeatures: rows are older than accepted, and `stale` is "fail".
            RowsUnavailable: rows did not come in time, and `partial` is "fail".
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
        """Look up numeric features of many keys straight into one matrix, faster than `lookup` and then `to_numpy`.

        Arguments and errors are those of `lookup`; LookupInvalid also where a feature is no number. It is float32
        if that holds all the types asked for exactly, and float64 otherwise.
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
        """The rows of a request that are kept in tables; None if there are none."""
        views = _lookup.remote_views(version, features)
        if not views:
            return None
        if self._remote is None:
            with self._refreshing:
                if self._remote is None:
                    # Only here: whoever has no such views is not to pay for what they need.
                    from engine.dynamodb.tier import BlockingTier

                    self._remote = BlockingTier(self.path, **self.remote_options)
        return self._remote.fetch(views, entities, incomplete, seconds)

    def version(self) -> StoreVersion:
        """Return the newest committed version; raise StoreClosed if the store was closed."""
        version = self._version
        if version is not None and self._is_newest(version):
            return version
        with self._refreshing:
            if self._version is None:
                raise StoreClosed(f"the store at {self.path} was closed here; open it again, or close it later")
            if not self._is_newest(self._version):
                self._version = self._read(self._version.live, self._version)
            return self._version

    def check_in_place(self) -> None:
        """Check that the store's path leads to the files that are looked up in; raises StoreMoved."""
        while True:
            live = self.version().live
            try:
                return live.check_in_place(self.path)
            except StoreMoved:
                # It may have been replaced, and removed, while it was looked at.
                if self.version().live is live:
                    raise

    def _is_newest(self, version: StoreVersion) -> bool:
        """Whether there is nothing to read; a damaged view may be whole again without a commit."""
        retry = version.damaged and time.monotonic() > self._retry_at
        return version.is_newest and not retry

    def _read(self, live: LiveEnvironment, previous: StoreVersion | None) -> StoreVersion:
        while True:
            version = read_version(self.path, live, previous)
            # A generation may go while its version is being opened, if a newer one has come.
            if not version.damaged or version.is_newest:
                self._retry_at = time.monotonic() + _RETRY_SECONDS
                return version
