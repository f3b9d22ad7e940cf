"""A Feast repository with files, views, services and a sqlite online store, made and materialized by Feast itself."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from click.testing import CliRunner

from shoal.engine.cli.feast_commands import feast_diff_command

USERS = 40
NOW = datetime.now(UTC).replace(microsecond=0)
_CONFIGURATION = """
project: takeover
provider: local
registry: data/registry.db
online_store: {type: sqlite, path: data/online.db}
entity_key_serialization_version: 3
"""


@dataclass(frozen=True)
class Place:
    """The directory of a Feast repository and of the files that Shoal makes from it."""

    directory: Path

    @property
    def repository(self) -> Path:
        return self.directory / "repository"

    @property
    def store(self) -> Path:
        return self.directory / "store"

    def shoal(self, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run a `shoal` command and assert its exit code."""
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, "-m", "shoal", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=self.directory, env=environment)
        assert done.returncode == code, done.stderr + done.stdout
        return done

    def run_diff(self, *arguments: object) -> tuple[int, str, str]:
        """Run `shoal feast-diff` on the store and return its exit code, stdout and stderr.

        The command runs in this process, because Feast is already imported here.
        """
        here = ["--repo", self.repository, "--store", self.store]
        done = CliRunner().invoke(feast_diff_command, [str(argument) for argument in (*here, *arguments)])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done.exit_code, done.stdout, done.stderr

    def diff(self, *arguments: object, code: int = 0) -> dict[str, Any]:
        """Return the JSON report of `shoal feast-diff` about the store."""
        found, out, said = self.run_diff("--json", *arguments)
        assert found == code, said + out
        document: dict[str, Any] = json.loads(out)
        return document


def make_repository(feast: Any, place: Place, *, unmappable: bool = False) -> Any:
    """Write the sources, apply all views, materialize them, and return the `feast.FeatureStore`.

    With `unmappable`, also apply the definitions without a counterpart in Shoal, and materialize nothing.
    """
    (place.repository / "data").mkdir(parents=True)
    (place.repository / "feature_store.yaml").write_text(_CONFIGURATION)
    _write_sources(place.repository / "data")
    store = feast.FeatureStore(repo_path=str(place.repository))
    store.apply(_definitions(feast, unmappable))
    if not unmappable:
        store.materialize(datetime(2020, 1, 1, tzinfo=UTC), NOW + timedelta(hours=1))
    return store


def _write_sources(data: Path) -> None:
    numbers = range(USERS)
    users = {
        "user_id": pa.array(numbers),
        # Wider than the declared type, as pandas writes it.
        "score": pa.array([number / 7 for number in numbers], pa.float64()),
        "clicks": pa.array([None if number == 5 else number for number in numbers], pa.int64()),
        "name": [f"user {number} é" for number in numbers],
        "active": [number % 2 == 0 for number in numbers],
        "blob": pa.array([bytes([number, 255]) for number in numbers], pa.binary()),
        "joined": pa.array([NOW - timedelta(days=number) for number in numbers], pa.timestamp("us", "UTC")),
        "tags": [[f"tag {number}"] for number in numbers],
        "embedding": pa.array([[number / 3, 1.0, -2.5] for number in numbers], pa.list_(pa.float64())),
        "at": pa.array([NOW - timedelta(minutes=number) for number in numbers], pa.timestamp("ns")),
    }
    pairs = {
        "uid": pa.array([number // 2 for number in numbers]),
        "item_id": [f"item {number % 2}" for number in numbers],
        "times seen": pa.array(numbers, pa.int32()),
        "at": pa.array([NOW] * USERS, pa.timestamp("us", "UTC")),
    }
    # Each item has two rows with the same event time: the row with the later `created` time wins.
    items = {
        "item_id": [f"item {number // 2}" for number in numbers],
        "price": [float(number) for number in numbers],
        "at": pa.array([NOW - timedelta(days=30)] * USERS, pa.timestamp("us", "UTC")),
        "created": pa.array([NOW + timedelta(seconds=number % 2) for number in numbers], pa.timestamp("us", "UTC")),
    }
    plain = {
        "item_id": [f"item {number}" for number in numbers],
        "stock": pa.array(numbers, pa.int64()),
        "at": pa.array([NOW] * USERS, pa.timestamp("us", "UTC")),
    }
    for name, columns in {"users": users, "pairs": pairs, "items": items, "stock": plain}.items():
        pq.write_table(pa.table(columns), data / f"{name}.parquet")


def _definitions(feast: Any, unmappable: bool) -> list[Any]:
    from feast.on_demand_feature_view import on_demand_feature_view
    from feast.types import Array, Bool, Bytes, Float32, Float64, Int32, Int64, Map, String, UnixTimestamp

    user = feast.Entity(name="user", join_keys=["user_id"], value_type=feast.ValueType.INT64)
    item = feast.Entity(name="item", join_keys=["item_id"], value_type=feast.ValueType.STRING)

    def source(name: str, **options: Any) -> Any:
        return feast.FileSource(name=f"{name}_file", path=f"data/{name}.parquet", timestamp_field="at", **options)

    def view(name: str, entities: list[Any], of: Any, ttl: timedelta | None = None, /, **features: Any) -> Any:
        keys = [feast.Field(name="user_id", dtype=Int64)] * (user in entities)
        keys += [feast.Field(name="item_id", dtype=String)] * (item in entities)
        fields = [
            dtype if isinstance(dtype, feast.Field) else feast.Field(name=feature, dtype=dtype)
            for feature, dtype in features.items()
        ]
        return feast.FeatureView(name=name, entities=entities, schema=[*keys, *fields], source=of, ttl=ttl)

    embedding = feast.Field(name="embedding", dtype=Array(Float32), vector_index=True, vector_length=3)
    users = view(
        "users",
        [user],
        source("users"),
        timedelta(days=2),
        score=Float32,
        clicks=Int64,
        name=String,
        active=Bool,
        blob=Bytes,
        joined=UnixTimestamp,
        tags=Array(String),
        embedding=embedding,
    )
    mapping = {"uid": "user_id", "times seen": "seen"}
    pairs = view("pairs", [user, item], source("pairs", field_mapping=mapping), seen=Int32)
    items = view("items", [item], source("items", created_timestamp_column="created"), timedelta(days=1), price=Float64)
    stock = view("stock", [item], source("stock"), timedelta(seconds=90), stock=Int64)
    ranker = feast.FeatureService(name="ranker", features=[users[["score", "embedding"]], pairs, stock])
    definitions = [user, item, users, pairs, items, stock, ranker]
    if unmappable:
        fields = [feast.Field(name="double", dtype=Float64)]

        @on_demand_feature_view(sources=[users], schema=fields, mode="python")  # type: ignore[untyped-decorator]
        def doubled(inputs: dict[str, Any]) -> dict[str, Any]:
            return {"double": [2 * score for score in inputs["score"]]}

        bought = items.with_name("bought").with_join_key_map({"item_id": "bought_id"})
        hidden = view("hidden", [item], source("stock"), stock=Int64)
        hidden.online = False
        pushed = feast.PushSource(name="clicks_push", batch_source=source("users"))
        definitions += [
            view("world", [], source("stock"), stock=Int64),
            view("odd-name", [item], source("stock"), stock=Int64),
            view("extras", [user], source("users"), clicks=Int64, attributes=Map),
            hidden,
            view("pushed", [user], pushed, clicks=Int64),
            doubled,
            feast.FeatureService(name="both", features=[stock, bought, doubled]),
        ]
    return definitions
