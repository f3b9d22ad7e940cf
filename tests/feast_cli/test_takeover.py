"""From a Feast repository to Shoal: make views.yaml, export with Spark, and compare every value."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shoal.spark_export.views.definition import load_views
from tests.feast_cli.repository import USERS, Place, make_repository
from tests.server.serving import Server

ALL = "users:*,pairs:*,items:*,stock:*"


def test_views_are_those_of_the_repository(taken_over: Place) -> None:
    made = load_views(taken_over.directory / "views.yaml")
    views = {view.name: view for view in made.views}
    assert [*views] == ["items", "pairs", "stock", "users"]
    assert [(key.name, key.type) for key in views["pairs"].join_keys] == [("user_id", "int64"), ("item_id", "string")]
    assert {feature.name: feature.type for feature in views["users"].features} == {
        "score": "float32",
        "clicks": "int64",
        "name": "string",
        "active": "bool",
        "blob": "bytes",
        "joined": "timestamp",
        "tags": "list<string>",
        "embedding": "float32[3]",
    }
    assert views["stock"].source is not None
    assert views["stock"].source.path == str(taken_over.repository / "data" / "stock.parquet")
    assert views["stock"].ttl is not None
    assert views["stock"].ttl.total_seconds() == 90
    assert views["pairs"].ttl is None
    assert [service.name for service in made.services] == ["ranker"]


def test_views_made_twice_are_the_same_text(taken_over: Place) -> None:
    text = (taken_over.directory / "views.yaml").read_text()
    assert taken_over.shoal("feast-views", "repository").stdout == text


def test_a_registry_alone_does_not_say_where_relative_paths_lead(taken_over: Place) -> None:
    done = taken_over.shoal("feast-views", "repository/data/registry.db", code=2)
    assert "project 'takeover'" in done.stderr
    assert "'data/stock.parquet' is relative to the repository" in done.stderr


def test_nothing_differs_after_a_takeover(taken_over: Place) -> None:
    said = taken_over.diff("--features", ALL, "--sample", USERS)
    assert said["differences"] == []
    assert said["summary"]["keys"] == USERS
    assert said["summary"]["equal"] == said["summary"]["compared"] == USERS * 11
    assert said["summary"]["older_than_ttl"] > 0
    assert said["summary"]["other_event_times"] == 0


def test_a_service_over_http_does_not_differ_either(taken_over: Place) -> None:
    keys = taken_over.directory / "keys.csv"
    keys.write_text("user_id,item_id,more\n" + "".join(f"{n // 2},item {n % 2},x\n" for n in range(USERS)))
    with Server(taken_over.store) as server:
        server.await_ready()
        arguments = ["--repo", "repository", "--server", server.record.address, "--keys", keys, "--json"]
        done = taken_over.shoal("feast-diff", *arguments, "--service", "ranker")
        assert json.loads(done.stdout)["summary"]["equal"] == USERS * 4
        done = taken_over.shoal("feast-diff", *arguments, "--features", ALL)
        assert json.loads(done.stdout)["summary"]["equal"] == USERS * 11


def test_a_value_that_changed_in_feast_is_the_one_difference(taken_over: Place, feast: Any, tmp_path: Path) -> None:
    online = taken_over.repository / "data" / "online.db"
    before = online.read_bytes()
    store = feast.FeatureStore(repo_path=str(taken_over.repository))
    frame = pq.read_table(taken_over.repository / "data" / "stock.parquet").slice(7, 1).to_pandas()
    frame["stock"] = [-1]
    store.write_to_online_store("stock", frame)
    try:
        keys = tmp_path / "keys.parquet"
        pq.write_table(pa.table({"item_id": [f"item {number}" for number in range(USERS)]}), keys)
        said = taken_over.diff("--features", "stock:*,items:price", "--keys", keys, code=1)
        (difference,) = said["differences"]
        assert (difference["key"], difference["feature"]) == ({"item_id": "item 7"}, "stock:stock")
        assert (difference["feast"]["value"], difference["shoal"]["value"]) == (-1, 7)
        assert (said["summary"]["different"], said["summary"]["equal"]) == (1, USERS * 2 - 1)
        _, out, _ = taken_over.run_diff("--features", "stock:*", "--keys", keys)
        text = out.splitlines()
        assert text[0].startswith("item_id=item 7 stock:stock: Feast -1 (PRESENT, 20")
        assert "39 equal, 1 different, 0 missing in Feast, 0 missing in Shoal" in text[1]
        taken_over.diff("--features", "stock:*", "--keys", keys, "--tolerance", 8)
    finally:
        online.write_bytes(before)


def test_a_row_that_feast_lacks_is_told(taken_over: Place) -> None:
    online = taken_over.repository / "data" / "online.db"
    before = online.read_bytes()
    with closing(sqlite3.connect(online)) as database, database:
        database.execute(
            "DELETE FROM takeover_stock WHERE entity_key IN (SELECT entity_key FROM takeover_stock LIMIT 1)"
        )
    try:
        said = taken_over.diff("--features", "stock:stock", "--sample", USERS, "--max", 0, code=1)
        assert (said["summary"]["missing_in_feast"], said["differences"]) == (1, [])
    finally:
        online.write_bytes(before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--features", "stock:*", "--sample", 3, "--key", "item_id=a"], "give one of --keys, --key and --sample"),
        (["--features", "nope:x", "--sample", 3], "Shoal has no view 'nope'"),
        (["--features", "stock:x", "--sample", 3], "view 'stock' has no feature 'x'"),
        (["--service", "nope", "--sample", 3], "Shoal has no feature service 'nope'"),
        (["--features", "users:name", "--key", "user_id=a"], "user_id is int64, but 'a' is not a whole number"),
        (["--features", "users:name", "--key", "item_id=a"], "'item_id' is not a join key of the requested views"),
        (["--features", "users:name", "--keys", "nowhere.csv"], "cannot read keys from nowhere.csv"),
        (["--features", "users:name", "--keys", "views.yaml"], "cannot read keys from views.yaml"),
    ],
)
def test_what_cannot_be_compared_ends_with_2(taken_over: Place, arguments: list[object], message: str) -> None:
    code, _, said = taken_over.run_diff(*arguments)
    assert code == 2
    assert message in said


def test_no_server_and_no_repository_end_with_2(taken_over: Place) -> None:
    asked = ["--features", "stock:*", "--key", "item_id=a"]
    done = taken_over.shoal("feast-diff", "--repo", "repository", "--server", "http://127.0.0.1:1", *asked, code=2)
    assert "http://127.0.0.1:1/v1/views does not answer" in done.stderr
    done = taken_over.shoal("feast-diff", "--repo", "root", "--store", "store", *asked, code=2)
    assert "root has no feature_store.yaml" in done.stderr


def test_what_has_no_counterpart_is_listed_and_left_out_only_if_asked(feast: Any, place: Place) -> None:
    make_repository(feast, place, unmappable=True)
    done = place.shoal("feast-views", "repository", "--output", "views.yaml", code=2)
    assert not (place.directory / "views.yaml").exists()
    listed = [line.strip() for line in done.stderr.splitlines()[1:]]
    names = [line.split(": ", 1)[0] for line in listed]
    assert names == [
        "feature extras:attributes",
        "feature view odd-name",
        "feature view world",
        "on-demand feature view doubled",
        "feature service both",
        "feature service both",
    ]
    done = place.shoal("feast-views", "repository", "--output", "views.yaml", "--skip-unmappable")
    assert [line.removeprefix("left out: ") for line in done.stderr.splitlines()] == listed
    made = load_views(place.directory / "views.yaml")
    assert [view.name for view in made.views] == ["extras", "items", "pairs", "pushed", "stock", "users"]
    assert {service.name: service.features for service in made.services}["both"] == ("stock:stock",)
    text = (place.directory / "views.yaml").read_text()
    assert "# feature view hidden is not served online in Feast: left out" in text
    assert next(view for view in made.views if view.name == "pushed").push_source == "clicks_push"
    assert all(f"#   {line}" in text for line in listed)

    accepted = ["--skip", "extras:attributes", "--skip", "odd-name", "--skip", "world", "--skip", "both"]
    done = place.shoal("feast-views", "repository", *accepted, code=2)
    assert [line.strip() for line in done.stderr.splitlines()[1:]] == [listed[3]]
    done = place.shoal("feast-views", "repository", *accepted, "--skip", "doubled", "--skip", "stock")
    assert done.stdout == text
    assert done.stderr.splitlines()[len(listed) :] == ["--skip stock: no definition with that name had to be left out"]
