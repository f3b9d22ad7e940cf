"""Versions of feature views in a store: the active one is served, even if others are staged, written or pinned."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shoal import FeatureStore
from shoal.engine.base.errors import FeastVersionInactive

NOW = datetime.now(UTC).replace(microsecond=0)
KEYS = [{"user_id": 1}, {"user_id": 2}]
CONFIGURATION = """
project: versions
provider: local
registry: {path: data/registry.db, enable_online_feature_view_versioning: VERSIONED}
online_store: {type: shoal.feast.ShoalOnlineStore, store: data/store}
entity_key_serialization_version: 3
"""


@pytest.fixture(params=["versioned", "not versioned"])
def repository(request: pytest.FixtureRequest, feast: Any, tmp_path: Path) -> Any:
    """A repository with a view `users` that has x = 1, 2 and y = 3, 4."""
    (tmp_path / "data").mkdir()
    versioned = str(request.param == "versioned").lower()
    (tmp_path / "feature_store.yaml").write_text(CONFIGURATION.replace("VERSIONED", versioned))
    for name, columns in {"first": {"x": [1, 2], "y": [3, 4]}, "second": {"x": [100, 200], "z": [5, 6]}}.items():
        at = pa.array([NOW - timedelta(hours=1)] * 2, pa.timestamp("us", "UTC"))
        pq.write_table(pa.table({"user_id": [1, 2], "at": at, **columns}), tmp_path / "data" / f"{name}.parquet")
    store = feast.FeatureStore(repo_path=str(tmp_path))
    store.apply(objects(feast, tmp_path, "first", "x", "y"))
    materialize(store)
    return store


def objects(feast: Any, directory: Path, source: str, *features: str, version: str = "latest") -> list[Any]:
    user = feast.Entity(name="user", join_keys=["user_id"], value_type=feast.ValueType.INT64)
    of = feast.FileSource(name=source, path=str(directory / f"data/{source}.parquet"), timestamp_field="at")
    fields = [feast.Field(name=name, dtype=feast.types.Int64) for name in ("user_id", *features)]
    view = feast.FeatureView(name="users", entities=[user], schema=fields, source=of, ttl=timedelta(0), version=version)
    return [user, of, view]


def materialize(store: Any, **options: Any) -> None:
    store.materialize(NOW - timedelta(days=1), NOW, feature_views=["users"], **options)


def served(store: Any, *features: str) -> list[list[Any]]:
    references = [f"users:{name}" for name in features]
    found = store.get_online_features(features=references, entity_rows=KEYS).to_dict()
    return [found[name] for name in features]


def version_of(store: Any, number: int) -> Any:
    return store.registry.get_feature_view_by_version("users", "versions", number)


def write(store: Any, view: Any) -> None:
    """Write x = 7 to a definition, with the call that all of Feast's ways to write end in."""
    from feast.protos.feast.types import EntityKey_pb2, Value_pb2

    key = EntityKey_pb2.EntityKey(join_keys=["user_id"], entity_values=[Value_pb2.Value(int64_val=1)])
    row = (key, {"x": Value_pb2.Value(int64_val=7)}, NOW, None)
    store.provider.online_write_batch(store.config, view, [row], None)


def refuses(attempt: Callable[[], object], message: str) -> None:
    with pytest.raises(FeastVersionInactive, match=message):
        attempt()


def test_a_staged_version_changes_nothing(feast: Any, repository: Any, tmp_path: Path) -> None:
    repository.apply(objects(feast, tmp_path, "second", "x", "z"), no_promote=True)
    schema = FeatureStore.open(tmp_path / "data/store").version().view("users").record.view_schema
    assert [feature.name for feature in schema.features] == ["x", "y"]
    refuses(
        lambda: write(repository, version_of(repository, 1)), "version 1 cannot be written, because version 0 is active"
    )
    if repository.config.registry.enable_online_feature_view_versioning:
        refuses(lambda: materialize(repository, version="v1"), "version 1 cannot be written")
        materialize(repository, version="v0")
    # A definition that was read from a registry and then changed already has a version number.
    changed = repository.get_feature_view("users")
    changed.features = changed.features[:1]
    repository.apply([changed], no_promote=True)
    assert served(repository, "x", "y") == [[1, 2], [3, 4]]
    materialize(repository)
    assert served(repository, "x", "y") == [[1, 2], [3, 4]]


def test_once_it_is_promoted_the_version_before_is_refused(feast: Any, repository: Any, tmp_path: Path) -> None:
    repository.apply(objects(feast, tmp_path, "second", "x", "z"))
    assert served(repository, "x", "z") == [[1, 2], [None, None]]
    materialize(repository)
    assert served(repository, "x", "z") == [[100, 200], [5, 6]]
    refuses(
        lambda: write(repository, version_of(repository, 0)), "version 0 cannot be written, because version 1 is active"
    )
    write(repository, version_of(repository, 1))
    # Another process promotes a version, so this process has an old copy of the registry.
    other = feast.FeatureStore(repo_path=str(tmp_path))
    other.apply(objects(feast, tmp_path, "first", "x", "y"))
    write(repository, version_of(other, 2))
    assert served(other, "x") == [[7, 200]]


def test_going_back_to_a_version_makes_it_the_active_one(feast: Any, repository: Any, tmp_path: Path) -> None:
    repository.apply(objects(feast, tmp_path, "second", "x", "z"))
    repository.apply(objects(feast, tmp_path, "second", "x", "z", version="v0"))
    assert served(repository, "x", "y") == [[1, 2], [3, 4]]
    refuses(
        lambda: write(repository, version_of(repository, 1)), "version 1 cannot be written, because version 0 is active"
    )
    materialize(repository)
    assert served(repository, "x", "y") == [[1, 2], [3, 4]]


def test_a_version_that_is_asked_for_by_its_number_must_be_the_active_one(
    feast: Any, repository: Any, tmp_path: Path
) -> None:
    from feast.protos.feast.types import EntityKey_pb2, Value_pb2

    repository.apply(objects(feast, tmp_path, "second", "x", "z"))
    key = EntityKey_pb2.EntityKey(join_keys=["user_id"], entity_values=[Value_pb2.Value(int64_val=1)])

    def read(number: int) -> Any:
        view = version_of(repository, number)
        view.projection.version_tag = number
        return repository.provider.online_read(repository.config, view, [key], ["x"])[0][1]["x"].int64_val

    assert read(1) == 1
    refuses(lambda: read(0), "version 0 was requested, but a Shoal store holds only the active version, 1")
