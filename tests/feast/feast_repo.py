"""Create a Feast repository with sqlite as its online store, and load rows into it through Feast's own interface.

Run it with the interpreter of the peers' environment, which has Feast and lacks Shoal:

    python tests/feast/feast_repo.py REPO DATA

DATA contains `definitions.json`, with views and services as Shoal describes them, and the rows of each view in
`VIEW.parquet`.
"""

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, ValueType
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.type_map import python_values_to_proto_values
from feast.types import Array, Bool, Bytes, Float32, Float64, Int32, Int64, String, UnixTimestamp

TYPES: dict[str, Any] = {
    "bool": Bool,
    "int32": Int32,
    "int64": Int64,
    "float32": Float32,
    "float64": Float64,
    "string": String,
    "bytes": Bytes,
    "timestamp": UnixTimestamp,
    "list<int64>": Array(Int64),
    "list<float32>": Array(Float32),
    "list<string>": Array(String),
    "float32[3]": Array(Float32),
}
KEY_TYPES = {"int64": ValueType.INT64, "string": ValueType.STRING}


def main() -> None:
    """Define all views and services, and write all rows."""
    repo = Path(sys.argv[1])
    data = Path(sys.argv[2])
    repo.mkdir(parents=True)
    (repo / "feature_store.yaml").write_text(
        "project: compared\nregistry: registry.db\nprovider: local\n"
        "online_store:\n  type: sqlite\n  path: online.db\n"
        "offline_store:\n  type: file\nentity_key_serialization_version: 3\n"
    )
    definitions = json.loads((data / "definitions.json").read_text())
    entities = {
        key["name"]: Entity(name=f"entity_{key['name']}", join_keys=[key["name"]], value_type=KEY_TYPES[key["type"]])
        for view in definitions["views"]
        for key in view["join_keys"]
    }
    views = {view["name"]: defined_view(view, entities, data) for view in definitions["views"]}
    services = [defined_service(service, views) for service in definitions["services"]]
    store = FeatureStore(str(repo))
    store.apply([*entities.values(), *views.values(), *services])
    for view in definitions["views"]:
        write(store, view, views[view["name"]], data)


def defined_view(view: dict[str, Any], entities: dict[str, Entity], data: Path) -> FeatureView:
    columns = [*view["join_keys"], *view["features"]]
    return FeatureView(
        name=view["name"],
        entities=[entities[key["name"]] for key in view["join_keys"]],
        ttl=timedelta(seconds=view["ttl_seconds"] or 0),
        schema=[Field(name=column["name"], dtype=TYPES[column["type"]]) for column in columns],
        source=FileSource(
            name=f"source_{view['name']}",
            path=str(data / f"{view['name']}.parquet"),
            timestamp_field="event_timestamp",
        ),
    )


def defined_service(service: dict[str, Any], views: dict[str, FeatureView]) -> FeatureService:
    """Return a service in which the features of each view are next to each other."""
    names: dict[str, list[str]] = {}
    for reference in service["features"]:
        view, _, feature = reference.partition(":")
        names.setdefault(view, []).append(feature)
    return FeatureService(name=service["name"], features=[views[view][of_view] for view, of_view in names.items()])


def write(store: FeatureStore, view: dict[str, Any], feature_view: FeatureView, data: Path) -> None:
    """Write a view's rows. Feast's own functions convert them, one column at a time, as Feast does."""
    table = pq.read_table(data / f"{view['name']}.parquet")
    columns = {
        column["name"]: python_values_to_proto_values(
            table.column(column["name"]).to_pylist(), TYPES[column["type"]].to_value_type()
        )
        for column in [*view["join_keys"], *view["features"]]
    }
    keys = [key["name"] for key in view["join_keys"]]
    rows = [
        (
            EntityKey(join_keys=keys, entity_values=[columns[key][row] for key in keys]),
            {feature["name"]: columns[feature["name"]][row] for feature in view["features"]},
            time,
            None,
        )
        for row, time in enumerate(table.column("event_timestamp").to_pylist())
    ]
    store._get_provider().online_write_batch(store.config, feature_view, rows, None)


if __name__ == "__main__":
    main()
