"""Shoal as Feast's online store: `online_store: {type: loaders.feast_store.ShoalOnlineStore, store: DIR}`.

Reads are lookups in the store's map. Writes go through the server's writer where one runs on the store, and otherwise
take the store's lock for as long as they last, so that several processes may write in turn.
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

from engine.environment import DATA, live_path, open_live
from engine.errors import SettingsInvalid
from engine.feature_store import FeatureStore
from engine.kernels.gathering import Status
from engine.times import to_datetime
from loaders.feast_rows import Row, columns_of, key_columns, reader, schema_of
from loaders.feast_versions import Versions
from loaders.feast_writers import writing

PROJECT = "feast-project"
"""The file in a store that names the Feast project whose views are in it."""

_ROWS_A_PUSH = 50_000

Progress = Callable[[int], Any] | None
Found = tuple[datetime | None, dict[str, Any] | None]


class ShoalOnlineStoreConfig(FeastConfigBaseModel):  # type: ignore[misc]  # To the type checker Feast is Any.
    """The member `online_store` of feature_store.yaml; `store` is the store's directory, which is of one project, as an
    absolute path or from the repository's."""

    type: Literal["loaders.feast_store.ShoalOnlineStore"] = "loaders.feast_store.ShoalOnlineStore"
    store: str


class ShoalOnlineStore(OnlineStore):  # type: ignore[misc]
    """A Shoal store under a Feast repository. As with Feast's own stores no row is too old to be read."""

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
        """The event time and the values of each entity key, (None, None) where there is no row.

        Raises:
            StoreNotFound: nothing was applied to the store yet.
            UnknownFeature: the view, or one of its features, was not applied.
            RowsUnavailable: the view is kept in a table, and its rows did not come in time.
            FeastVersionInactive: a version is asked for that is not the active one.
        """
        fields = [field for field in table.features if requested_features is None or field.name in requested_features]
        self._versions.check_read(config, table)
        if not entity_keys or not fields:
            return [(None, None)] * len(entity_keys)
        schema = schema_of(table)
        keys = key_columns(schema, entity_keys)
        stored = [field.name for field in fields if field.name not in keys]
        # Whether there is a row is known from any of its features.
        references = [f"{table.name}:{name}" for name in stored or [schema.features[0].name]]
        # Feast has no way to say that a row did not come in time.
        how: dict[str, Any] = {"stale": "serve", "incomplete": "not_found", "partial": "fail"}
        result = self._reader(_store_of(config)).lookup(references, keys, **how)
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
        """As `online_read`: there is nothing to wait for."""
        return self.online_read(config, table, entity_keys, requested_features)

    def _reader(self, store: Path) -> FeatureStore:
        with self._opening:
            if store not in self._readers:
                # A process that had the store open for reading only could not write to it later.
                writable = os.access(live_path(store) / DATA, os.W_OK)
                opened = FeatureStore(store, open_live(store, writable=True)) if writable else FeatureStore.open(store)
                self._readers[store] = opened
            return self._readers[store]

    # --- writing ---------------------------------------------------------------------------------------------------

    def online_write_batch(self, config: Any, table: Any, data: Sequence[Row], progress: Progress) -> None:
        """Write rows; they are on the disk when this returns. One that is older than the store's changes nothing.

        Raises:
            Unmappable: the view cannot be kept in a Shoal store.
            PushInvalid: a value is not of its feature's type, a time is outside the years 1 to 9999, or an event time
                is more than a day ahead.
            FeastVersionInactive: the rows are of a version that is not the active one.
            StoreLocked, StoreFull: the store cannot be written.
        """
        self._versions.check_written(config, table)
        schema = schema_of(table)
        with self._writing, writing(_store_of(config)) as target:
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
        """As `online_write_batch`, in a thread."""
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
        """Have the views to keep, with the features that they have now, and drop those to delete. A version that is
        staged changes nothing.

        Raises:
            Unmappable: a view cannot be kept in a Shoal store.
            SchemaChangeRefused: a feature changed its type so that stored values cannot follow.
            SettingsInvalid: the store is of another project.
        """
        definitions = (self._versions.active_definition(config, view) for view in tables_to_keep)
        schemas, store = [schema_of(view) for view in definitions if view is not None], _store_of(config)
        with self._writing, writing(store) as target:
            _claim(store, config.project)
            present = target.version().views
            for view in tables_to_delete:
                if view.name in present:
                    target.drop(view.name)
            for schema in schemas:
                target.define(schema)

    def teardown(self, config: Any, tables: Sequence[Any], entities: Sequence[Any]) -> None:
        """Drop the project's views; a store that has no others, and no server, is removed."""
        store = _store_of(config)
        if not store.exists():
            return
        with self._writing, writing(store) as target:
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
    """Note that a store is of a project; raises SettingsInvalid if it is of another."""
    path = store / PROJECT
    owner = path.read_text().strip() if path.exists() else None
    if owner not in (None, project):
        raise SettingsInvalid(
            f"{store} holds the feature views of the Feast project {owner!r}, not of {project!r}; give each project a "
            f"store of its own"
        )
    path.write_text(f"{project}\n")
