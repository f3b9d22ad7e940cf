"""Shoal as Feast's online store: Feast's command line and SDK return the same results as with sqlite."""

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shoal import FeatureStore
from shoal.engine.base.errors import SchemaChangeRefused, SettingsInvalid
from tests.server.serving import Server, eventually

NOW = datetime.now(UTC).replace(microsecond=0)
USERS = 30
CONFIGURATION = """
project: {project}
provider: local
registry: data/registry.db
online_store: {online_store}
entity_key_serialization_version: 3
"""
DEFINITIONS = """
from datetime import timedelta
from feast import Entity, FeatureService, FeatureView, Field, FileSource, PushSource, ValueType
from feast.types import Array, Bool, Bytes, Float32, Float64, Int32, Int64, Json, Map, String, UnixTimestamp

user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
item = Entity(name="item", join_keys=["item_id"], value_type=ValueType.STRING)
users = FileSource(
    name="users_source", path="data/users.parquet", timestamp_field="at", created_timestamp_column="made"
)
users_view = FeatureView(
    name="users",
    entities=[user],
    ttl=timedelta(hours=2),
    schema=[
        Field(name="user_id", dtype=Int64),
        Field(name="score", dtype=Float32),
        Field(name="exact", dtype=Float64),
        Field(name="clicks", dtype=Int64),
        Field(name="level", dtype=Int32),
        Field(name="name", dtype=String),
        Field(name="active", dtype=Bool),
        Field(name="blob", dtype=Bytes),
        Field(name="joined", dtype=UnixTimestamp),
        Field(name="tags", dtype=Array(String)),
        Field(name="vector", dtype=Array(Float32)),
        Field(name="counts", dtype=Array(Int32)),
        Field(name="flags", dtype=Array(Bool)),
    ],
    source=users,
)
pairs = FeatureView(
    name="pairs",
    entities=[user, item],
    ttl=timedelta(0),
    schema=[Field(name="user_id", dtype=Int64), Field(name="item_id", dtype=String), Field(name="seen", dtype=Int32)],
    source=PushSource(
        name="pairs_push", batch_source=FileSource(path="data/pairs.parquet", timestamp_field="at")
    ),
)
everyone = FeatureView(
    name="everyone",
    entities=[],
    schema=[Field(name="rate", dtype=Float64)],
    source=FileSource(path="data/everyone.parquet", timestamp_field="at"),
)
ranker = FeatureService(name="ranker", features=[users_view[["score", "name"]], pairs, everyone])
"""
ALL = [
    *(
        f"users:{name}"
        for name in [
            "score",
            "exact",
            "clicks",
            "level",
            "name",
            "active",
            "blob",
            "joined",
            "tags",
            "vector",
            "counts",
            "flags",
        ]
    ),
    "pairs:seen",
    "everyone:rate",
]
ENTITIES = [{"user_id": number, "item_id": f"item {number % 3}"} for number in [0, 1, 2, 5, USERS - 1, USERS, 0, 3]]


class Repository:
    """A Feast repository in a directory, with methods that run Feast commands."""

    def __init__(self, directory: Path, online_store: str, project: str = "plugged") -> None:
        self.directory = directory
        (directory / "data").mkdir(parents=True)
        (directory / "feature_store.yaml").write_text(CONFIGURATION.format(project=project, online_store=online_store))
        (directory / "definitions.py").write_text(DEFINITIONS)
        write_sources(directory / "data")

    def feast(self, *arguments: str) -> str:
        """Run Feast's command line in the repository."""
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "FEAST_USAGE": "False"}
        command = [str(Path(sys.executable).with_name("feast")), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=self.directory, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def open(self, feast: Any) -> Any:
        return feast.FeatureStore(repo_path=str(self.directory))


def write_sources(data: Path) -> None:
    numbers = range(USERS)
    times = [NOW - timedelta(days=3, minutes=number) for number in numbers]
    users = {
        "user_id": pa.array(numbers, pa.int64()),
        "score": pa.array([None if number == 2 else number / 7 for number in numbers], pa.float32()),
        "exact": [number / 3 for number in numbers],
        "clicks": pa.array([2**60 + number for number in numbers], pa.int64()),
        "level": pa.array([-number for number in numbers], pa.int32()),
        "name": [None if number == 1 else f"user {number} é" for number in numbers],
        "active": [number % 2 == 0 for number in numbers],
        "blob": pa.array([bytes([number, 255]) for number in numbers], pa.binary()),
        "joined": pa.array([NOW - timedelta(days=number) for number in numbers], pa.timestamp("us", "UTC")),
        "tags": [[f"tag {number}", "x"] for number in numbers],
        "vector": pa.array([[number / 3, 1.0] for number in numbers], pa.list_(pa.float32())),
        "counts": pa.array([[number, -1] for number in numbers], pa.list_(pa.int32())),
        "flags": [[True, False] for _ in numbers],
        "at": pa.array(times, pa.timestamp("us", "UTC")),
        "made": pa.array(times, pa.timestamp("us", "UTC")),
    }
    pairs = {
        "user_id": pa.array([number for number in numbers for _ in range(3)], pa.int64()),
        "item_id": [f"item {place}" for _ in numbers for place in range(3)],
        "seen": pa.array([number * place for number in numbers for place in range(3)], pa.int32()),
        "at": pa.array([NOW - timedelta(days=1)] * USERS * 3, pa.timestamp("us", "UTC")),
    }
    everyone = {"rate": [0.25, 0.5], "at": pa.array([NOW - timedelta(days=2), NOW - timedelta(days=1)])}
    for name, columns in {"users": users, "pairs": pairs, "everyone": everyone}.items():
        pq.write_table(pa.table(columns), data / f"{name}.parquet")


@contextmanager
def served(store: Path, through_server: bool) -> Iterator[None]:
    """Yield with a server that writes to the store, or without a server."""
    if not through_server:
        yield
        return
    with Server(store, {"root": str(store.parent / "empty-root")}) as server:
        eventually(lambda: server.record.writer, "a writer")
        eventually(lambda: "cannot" not in server.log and (store / "run" / "writer.sock").exists(), "its socket")
        yield


@pytest.fixture(params=["alone", "through a server"])
def through_server(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "through a server")


def answers(store: Any, features: Any = ALL, entities: Any = ENTITIES) -> dict[str, Any]:
    found: dict[str, Any] = store.get_online_features(features=features, entity_rows=entities).to_dict()
    return found


@pytest.fixture(scope="module")
def judge(feast: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same repository with sqlite, already applied. Tests copy it."""
    directory = tmp_path_factory.mktemp("judge") / "sqlite"
    Repository(directory, "{type: sqlite, path: data/online.db}").feast("apply")
    return directory


def test_feast_finds_in_shoal_what_it_finds_in_sqlite(
    feast: Any, judge: Path, tmp_path: Path, through_server: bool
) -> None:
    (tmp_path / "empty-root").mkdir()
    directory = tmp_path / "store"
    shoal = Repository(tmp_path / "shoal", f"{{type: shoal.feast.ShoalOnlineStore, store: {directory}}}")
    shutil.copytree(judge, tmp_path / "sqlite")
    theirs = feast.FeatureStore(repo_path=str(tmp_path / "sqlite"))
    with served(directory, through_server):
        shoal.feast("apply")
        shoal.feast("materialize", "2020-01-01T00:00:00", (NOW - timedelta(hours=12)).isoformat())
        theirs.materialize(datetime(2020, 1, 1, tzinfo=UTC), NOW - timedelta(hours=12))
        ours = shoal.open(feast)
        assert answers(ours) == answers(theirs)
        assert answers(ours, ours.get_feature_service("ranker")) == answers(
            theirs, theirs.get_feature_service("ranker")
        )
        asynchronous = asyncio.run(ours.get_online_features_async(features=ALL, entity_rows=ENTITIES)).to_dict()
        assert asynchronous == answers(theirs)

        frame = pq.read_table(shoal.directory / "data" / "pairs.parquet").slice(0, 4).to_pandas()
        frame["seen"] = [100, 101, 102, None]
        frame["at"] = [NOW - timedelta(hours=1), NOW, NOW, NOW]
        for store in (ours, theirs):
            store.push("pairs_push", frame)
        assert answers(ours) == answers(theirs)
        frame["seen"] = [7, 7, 7, 7]
        asyncio.run(ours.push_async("pairs_push", frame.head(3)))
        theirs.push("pairs_push", frame.head(3))
        assert answers(ours) == answers(theirs)
        # Rows older than the store's row are ignored; Feast's sqlite accepts them.
        before = answers(ours)
        frame["at"] = [NOW - timedelta(days=5)] * 4
        ours.write_to_online_store("pairs", frame)
        assert answers(ours) == before

        for directory_of in (shoal.directory, tmp_path / "sqlite"):
            later = pq.read_table(directory_of / "data" / "users.parquet").slice(0, 5).to_pandas()
            later["clicks"], later["at"], later["made"] = [1, 2, 3, 4, 5], NOW, NOW
            pq.write_table(pa.Table.from_pandas(later), directory_of / "data" / "users.parquet")
        shoal.feast("materialize-incremental", "-v", "users", (NOW + timedelta(hours=1)).isoformat())
        theirs.materialize_incremental(NOW + timedelta(hours=1), feature_views=["users"])
        assert answers(ours, ALL[:12]) == answers(theirs, ALL[:12])
        assert answers(ours, ["users:clicks"])["clicks"][:2] == [1, 2]

        shoal.feast("teardown")
        assert not FeatureStore.open(directory).version().views if through_server else not directory.exists()


def test_a_view_that_was_deleted_comes_back_without_rows(feast: Any, tmp_path: Path) -> None:
    repository = Repository(tmp_path / "repo", "{type: shoal.feast.ShoalOnlineStore, store: data/store}")
    store = repository.open(feast)
    repository.feast("apply")
    store.materialize(datetime(2020, 1, 1, tzinfo=UTC), NOW, feature_views=["pairs"])
    assert answers(store, ["pairs:seen"])["seen"][1] == 1
    definitions = (repository.directory / "definitions.py").read_text()
    without = definitions[: definitions.index("pairs = ")] + definitions[definitions.index("everyone = ") :]
    (repository.directory / "definitions.py").write_text(without.replace("pairs, ", ""))
    repository.feast("apply")
    assert [*FeatureStore.open(repository.directory / "data/store").version().views] == ["everyone", "users"]
    (repository.directory / "definitions.py").write_text(definitions)
    repository.feast("apply")
    assert answers(repository.open(feast), ["pairs:seen"])["seen"] == [None] * len(ENTITIES)


def test_features_come_and_go(feast: Any, tmp_path: Path) -> None:
    repository = Repository(tmp_path / "repo", "{type: shoal.feast.ShoalOnlineStore, store: data/store}")
    repository.feast("apply")
    store = repository.open(feast)
    store.materialize(datetime(2020, 1, 1, tzinfo=UTC), NOW, feature_views=["pairs"])
    definitions = repository.directory / "definitions.py"
    text = definitions.read_text()
    definitions.write_text(
        text.replace(
            'Field(name="seen", dtype=Int32)]', 'Field(name="seen", dtype=Int64), Field(name="more", dtype=String)]'
        )
    )
    repository.feast("apply")
    found = answers(repository.open(feast), ["pairs:seen", "pairs:more"])
    assert (found["seen"][1], found["more"][1]) == (1, None)
    definitions.write_text(text.replace('name="seen", dtype=Int32', 'name="seen", dtype=String'))
    view = next(view for view in repository.open(feast).list_feature_views() if view.name == "pairs")
    view.features[0].dtype = feast.types.String
    with pytest.raises(SchemaChangeRefused, match="give the feature a new name"):
        repository.open(feast).apply([view])


def test_a_store_is_of_one_project(feast: Any, tmp_path: Path) -> None:
    online_store = f"{{type: shoal.feast.ShoalOnlineStore, store: {tmp_path / 'store'}}}"
    Repository(tmp_path / "one", online_store, "one").feast("apply")
    another = Repository(tmp_path / "two", online_store, "two").open(feast)
    with pytest.raises(SettingsInvalid, match="of the Feast project 'one', not of 'two'"):
        another.apply(
            [
                feast.Entity(name="e", join_keys=["e"]),
                feast.FeatureView(
                    name="v",
                    entities=[],
                    source=feast.FileSource(path="x", timestamp_field="t"),
                    schema=[feast.Field(name="f", dtype=feast.types.Int64)],
                ),
            ]
        )
