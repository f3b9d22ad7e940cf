"""Feast's SDK writes to Shoal as its online store of type `remote`, and reads what it wrote."""

import json
from datetime import UTC, datetime
from pathlib import Path

from shoal.engine.root.export_root import ExportRoot
from tests import stores
from tests.feast.conftest import FeastEnvironment
from tests.server.serving import Server

TRIPS = stores.schema(
    "trips",
    key="int64",
    clicks="int64",
    rate="float32",
    name="string",
    active="bool",
    at="timestamp",
    counts="list<int64>",
).model_copy(update={"push_source": "trips_push", "timestamp_field": "happened"})
NOON = int(datetime(2026, 1, 1, 12, tzinfo=UTC).timestamp())


def test_the_sdk_pushes_and_writes(feast_environment: FeastEnvironment, tmp_path: Path) -> None:
    root = ExportRoot(tmp_path / "root")
    stores.publish_snapshot(root, TRIPS, [])
    stores.load(tmp_path / "store", root)
    with Server(tmp_path / "store", {"root": str(root)}, workers=1) as server:
        server.await_ready()
        text = feast_environment.run("remote_writer.py", tmp_path / "repo", server.record.address)
        asked = {"features": ["trips:clicks"], "entities": {"trips_id": [1, 2]}}
        found = server.ask("POST", "/get-online-features", asked).json["results"][1]
    pushed, written, late = json.loads(text)
    assert pushed == {
        "trips_id": [1, 2, 3],
        "clicks": [1, 10, None],
        "rate": [0.5, None, None],
        "name": ["é", "two", None],
        "active": [True, False, None],
        "at": [NOON, NOON, None],
        "counts": [[1, 2], [3], None],
    }
    assert written["clicks"] == [2, 10, None]
    # The SDK sends times without a zone, and these times are in UTC.
    assert found["event_timestamps"] == ["2026-01-01T13:00:00Z", "2026-01-01T12:00:00Z"]
    # Rows that are older than the store's rows are not written.
    assert late == written
