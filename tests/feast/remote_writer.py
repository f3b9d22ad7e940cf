"""Write to Shoal through Feast's SDK, read the rows back, and write them to stdout as JSON. Shoal is the SDK's online
store of type `remote`.

Run it with the interpreter of the peers' environment, which has Feast and lacks Shoal:

    python tests/feast/remote_writer.py REPO URL

The script creates REPO, with the view `trips` as the test defines it in Shoal.
"""

import json
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, PushSource, RepoConfig, ValueType
from feast.types import Array, Bool, Float32, Int64, String, UnixTimestamp

FEATURES = ("clicks", "rate", "name", "active", "at", "counts")
START = datetime(2026, 1, 1, 12, tzinfo=UTC)


def main() -> None:
    """Push rows, write newer rows, and write rows that are too old. Read after each step."""
    repo = Path(sys.argv[1])
    url = sys.argv[2]
    repo.mkdir(parents=True)
    store = FeatureStore(
        config=RepoConfig(
            project="writing",
            registry=str(repo / "registry.db"),
            provider="local",
            online_store={"type": "remote", "path": url},
            offline_store={"type": "file"},
            entity_key_serialization_version=3,
        )
    )
    source = FileSource(path=str(repo / "none.parquet"), timestamp_field="happened", created_timestamp_column="made")
    trip = Entity(name="trip", join_keys=["trips_id"], value_type=ValueType.INT64)
    view = FeatureView(
        name="trips",
        entities=[trip],
        ttl=timedelta(0),
        schema=[
            Field(name="trips_id", dtype=Int64),
            Field(name="clicks", dtype=Int64),
            Field(name="rate", dtype=Float32),
            Field(name="name", dtype=String),
            Field(name="active", dtype=Bool),
            Field(name="at", dtype=UnixTimestamp),
            Field(name="counts", dtype=Array(Int64)),
        ],
        source=PushSource(name="trips_push", batch_source=source),
    )
    store.apply([trip, view])
    answers = []
    store.push("trips_push", frame(START, clicks=1))
    answers.append(read(store))
    store.write_to_online_store("trips", frame(START + timedelta(hours=1), clicks=2).head(1))
    answers.append(read(store))
    store.write_to_online_store("trips", frame(START - timedelta(hours=1), clicks=3))
    answers.append(read(store))
    json.dump(answers, sys.stdout)


def frame(time: datetime, clicks: int) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "trips_id": [1, 2],
            "clicks": [clicks, clicks * 10],
            "rate": [0.5, None],
            "name": ["é", "two"],
            "active": [True, False],
            "at": [START, START],
            "counts": [[1, 2], [3]],
            "happened": [time, time],
            "made": [time, time],
        }
    )


def read(store: FeatureStore) -> dict[str, Any]:
    answer: dict[str, Any] = store.get_online_features(
        features=[f"trips:{name}" for name in FEATURES], entity_rows=[{"trips_id": 1}, {"trips_id": 2}, {"trips_id": 3}]
    ).to_dict()
    return answer


if __name__ == "__main__":
    main()
