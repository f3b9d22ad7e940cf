"""Shoal as Feast's online store: `online_store: {type: shoal.feast.ShoalOnlineStore, store: DIR}`.

Reads are lookups in the memory-mapped store. If a server runs on the store, writes go through its writer. Otherwise a
write holds the store's lock until it is complete, so several processes may write in turn.
"""

import asyncio
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from feast.infra.online_stores.online_store import OnlineStore
from feast.infra.supported_async_methods import SupportedAsyncMethods
from feast.repo_config import FeastConfigBaseModel

from shoal.engine.base.errors import SettingsInvalid
from shoal.engine.base.times import to_datetime
from shoal.engine.feature_store import FeatureStore
from shoal.engine.format.paths import DATA, live_path
from shoal.engine.kernels.gathering import Status
from shoal.engine.store.environment import open_live
from shoal.loaders.feast.rows import Row, columns_of, key_columns, reader, schema_of
from shoal.loaders.feast.versions import Versions
from shoal.loaders.feast.writers import open_writer

PROJECT = "feast-project"
"""The name of the file in a store that holds the name of its Feast project."""

_ROWS_A_PUSH = 50_000

Progress = Callable[[int], Any] | None
Found = tuple[datetime | None, dict[str, Any] | None]


class ShoalOnlineStoreConfig(FeastConfigBaseModel):  # type: ignore[misc]  # To the type checker Feast is Any.
    """The member `online_store` of feature_store.yaml.

    `store` is the directory of the store, absolute or relative to the repository. A store belongs to one project.
    """

    type: Literal["shoal.feast.ShoalOnlineStore"] = "shoal.feast.ShoalOnlineStore"
    store: str


class ShoalOnlineStore(OnlineStore):  # type: ignore[misc]
    """A Shoal store as the online store of a Feast repository. As in Feast's own stores, rows of any age are read."""

    def __init__(self) -> None:
        self._readers: dict[Path, FeatureStore] = {}
        self._opening = threading.Lock()
        self._writing = threading.Lock()
        self._versions = Versions()

    @property
    def async_supported(self) -> SupportedAsyncMethods:
        return SupportedAsyncMethods(read=True, write=True)

    # --- reading ---------------------------------------------------------------------------------------------------

    def online_read(
        self, config: Any, table: Any, entity_keys: Sequence[Any], requested_features: Sequence[str] | None = None
    ) -> list[Found]:
        """Return the event time and the values of each entity key, or (None, None) for a key without a row.

        Raises:
            StoreNotFound: nothing was applied to the store yet.
            UnknownFeature: the view, or one of its features, was not applied.
            RowsUnavailable: the view is kept in a DynamoDB table, and the table did not return its rows in time.
            FeastVersionInactive: the requested version is not the active version.
        """
        fields = [field for field in table.features if requested_features is None or field.name in requested_features]
        self._versions.check_read(config, table)
        if not entity_keys or not fields:
            return [(None, None)] * len(entity_keys)
        schema = schema_of(table)
        keys = key_columns(schema, entity_keys)
        stored = [field.name for field in fields if field.name not in keys]
        # If only join keys are requested, look up any one feature to find out whether there is a row.
        references = [f"{table.name}:{name}" for name in stored or [schema.features[0].name]]
        # Feast has no status for a row that did not arrive in time, so such a lookup fails as a whole.
        options: dict[str, Any] = {"stale": "serve", "incomplete": "not_found", "partial": "fail"}
        result = self._reader(_store_of(config)).lookup(references, keys, **options)
        rows = result.views[table.name]
        names = [field.name for field in fields]
        found = {name: column.to_arrow().to_pylist() for name, column in zip(stored, result.columns, strict=False)}
        columns = [map(reader(field), (keys | found)[field.name]) for field in fields]
        values = zip(*columns, strict=True)
        return [
            (to_datetime(time), dict(zip(names, row, strict=True))) if status != Status.NOT_FOUND else (None, None)
            for status, time, row in zip(rows.status.tolist(), rows.event_time.tolist(), values, strict=True)
        ]

    async def online_read_async(
        self, config: Any, table: Any, entity_keys: Sequence[Any], requested_features: Sequence[str] | None = None
    ) -> list[Found]:
        """Call `online_read` without a thread, because it does not wait for I/O."""
        return self.online_read(config, table, entity_keys, requested_features)

    def _reader(self, store: Path) -> FeatureStore:
        with self._opening:
            if store not in self._readers:
                # If this process opened the store read-only, it could not write to the store later.
                writable = os.access(live_path(store) / DATA, os.W_OK)
                opened = FeatureStore(store, open_live(store, writable=True)) if writable else FeatureStore.open(store)
                self._readers[store] = opened
            return self._readers[store]

    # --- writing ---------------------------------------------------------------------------------------------------

    def online_write_batch(self, config: Any, table: Any, data: Sequence[Row], progress: Progress) -> None:
        """Write rows, and return once they are on the disk. Ignore rows that are older than those in the store.

        Raises:
            Unmappable: a Shoal store cannot represent the view.
            PushInvalid: a value does not have its feature's type, a time is outside the years 1 to 9999, or an event
                time is more than a day in the future.
            FeastVersionInactive: the rows belong to a version that is not the active version.
            StoreLocked, StoreFull: the store cannot be written.
        """
        self._versions.check_written(config, table)
        schema = schema_of(table)
        with self._writing, open_writer(_store_of(config)) as target:
            if schema.name not in target.version().views:
                target.define(schema)
            for start in range(0, len(data), _ROWS_A_PUSH):
                part = data[start : start + _ROWS_A_PUSH]
                columns = columns_of(schema, table, part)
                if any(feature.name in columns for feature in schema.features):
                    target.push(schema.name, columns)
                if progress is not None:
                    progress(len(part))
            target.settle(schema.name)

    async def online_write_batch_async(self, config: Any, table: Any, data: Sequence[Row], progress: Progress) -> None:
        """Run `online_write_batch` in a thread."""
        await asyncio.to_thread(self.online_write_batch, config, table, data, progress)

    # --- the repository's views ------------------------------------------------------------------------------------

    def update(
        self,
        config: Any,
        tables_to_delete: Sequence[Any],
        tables_to_keep: Sequence[Any],
        entities_to_delete: Sequence[Any],
        entities_to_keep: Sequence[Any],
        partial: bool,
    ) -> None:
        """Define the views to keep with their current features, and drop the views to delete. Ignore staged versions.

        Raises:
            Unmappable: a Shoal store cannot represent a view.
            SchemaChangeRefused: the type of a feature changed, and stored values cannot be converted.
            SettingsInvalid: the store belongs to another project.
        """
        definitions = (self._versions.active_definition(config, view) for view in tables_to_keep)
        schemas = [schema_of(view) for view in definitions if view is not None]
        store = _store_of(config)
        with self._writing, open_writer(store) as target:
            _claim(store, config.project)
            present = target.version().views
            for view in tables_to_delete:
                if view.name in present:
                    target.drop(view.name)
            for schema in schemas:
                target.define(schema)

    def teardown(self, config: Any, tables: Sequence[Any], entities: Sequence[Any]) -> None:
        """Drop the project's views. If the store then has no views, and no server runs on it, remove the store."""
        store = _store_of(config)
        if not store.exists():
            return
        with self._writing, open_writer(store) as target:
            present = target.version().views
            for view in {table.name for table in tables} & set(present):
                target.drop(view)
            (store / PROJECT).unlink(missing_ok=True)
            unused = target.is_alone and not target.version().views
        if unused:
            with self._opening:
                self._readers.pop(store, None)
            shutil.rmtree(store)


def _store_of(config: Any) -> Path:
    return Path(config.repo_path or ".", config.online_store.store).absolute()


def _claim(store: Path, project: str) -> None:
    """Record that a store belongs to a project. Raise SettingsInvalid if it belongs to another project."""
    path = store / PROJECT
    owner = path.read_text().strip() if path.exists() else None
    if owner not in (None, project):
        raise SettingsInvalid(
            f"{store} holds the feature views of the Feast project {owner!r}, not of {project!r}; give each project "
            f"its own store"
        )
    path.write_text(f"{project}\n")
