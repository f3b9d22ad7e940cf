"""A stream is killed between its writes and Spark's note of them, and started again: nothing is lost or repeated.

Spark runs in its own processes, with real servers and a real broker. The served features are compared with the events.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from shoal import FeatureStore
from shoal.engine.root.export_root import ExportRoot
from shoal.spark_export.stream.log import publish_definition
from shoal.spark_export.views.definition import load_views
from tests import stores
from tests.server.serving import Server, eventually

POINTS = ("stream.part-pushed", "stream.pushed", "stream.published", "stream.consolidated")
COLUMNS = "doc_id STRING, at TIMESTAMP, clicks BIGINT"
# All events are in the hour that begins here, which is in the past.
HOUR = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(hours=1)

Event = dict[str, Any]

_STREAM_SECONDS = 120.0
"""The time that a stream with its Spark has to begin or end, in seconds."""


def view(name: str, features: Sequence[str], stream: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "join_keys": [{"name": "doc_id", "type": "string"}],
        "features": [{"name": feature, "type": "int64"} for feature in features],
        "timestamp_field": "at",
        "shards": 2,
        "stream": stream,
    }


def event(key: str, second: int, clicks: int) -> Event:
    return {"doc_id": key, "at": (HOUR + timedelta(seconds=second)).isoformat(), "clicks": clicks}


@contextmanager
def streaming(directory: Path, *arguments: str, die_at: str | None = None) -> Iterator["subprocess.Popen[str]"]:
    """Run `shoal stream` in its own process, and kill it at the end of the block if it still runs."""
    command = [sys.executable, "-m", "shoal", "stream", "--views", "views.yaml", "--checkpoint", "checkpoint"]
    command += ["--master", "local[2]", *arguments]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    environment |= {"SHOAL_FAILPOINT": die_at} if die_at else {}
    with (directory / "stream.log").open("a+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, text=True, cwd=directory, env=environment)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def stream(directory: Path, *arguments: str, die_at: str | None = None) -> None:
    """Run a stream until it has read all events, or until it dies at its failpoint."""
    with streaming(directory, "--once", *arguments, die_at=die_at) as process:
        ended = process.wait(_STREAM_SECONDS)
    told = (directory / "stream.log").read_text()
    assert ended == (-signal.SIGKILL if die_at else 0), told
    assert ": reading " in told
    assert die_at or told.endswith("ended: all events are read\n"), told


def test_pushes_of_a_stream_that_is_killed(tmp_path: Path) -> None:
    source = {"format": "json", "path": "events", "columns": COLUMNS}
    (tmp_path / "views.yaml").write_text(yaml.safe_dump({"views": [view("docs", ["clicks"], source)]}))
    # These are more events than one push can hold.
    events = [event(f"d{number}", number % 60, number) for number in range(7000)]
    write_events(tmp_path / "events" / "1.json", events)
    root = ExportRoot(tmp_path / "root")
    publish_definition(load_views(tmp_path / "views.yaml").views[0], root, "tests")
    with Server(tmp_path / "store", {"root": str(root)}) as server:
        server.await_views("docs")
        to = ("--push-to", server.record.address)
        keys = [str(made["doc_id"]) for made in events]

        def served(of: Sequence[str] = keys) -> dict[str, int | None]:
            answer = server.lookup(["docs:clicks"], {"doc_id": of}).json["features"]["docs:clicks"]
            return dict(zip(of, answer, strict=True))

        stream(tmp_path, *to, die_at="stream.part-pushed")
        first = {key for key, clicks in served().items() if clicks is not None}
        assert 0 < len(first) < len(keys)
        stream(tmp_path, *to, die_at="stream.pushed")
        expected = {made["doc_id"]: made["clicks"] for made in events}
        assert served() == expected
        # If the batch were applied again, it would undo this push, because the later of two equal event times wins.
        changed = {"doc_id": ["d7"], "event_timestamp": [events[7]["at"]], "clicks": [-1]}
        assert server.ask("POST", "/v1/push", {"view": "docs", "rows": changed}).status == 200
        with streaming(tmp_path, *to, "--every", "0.1") as process:
            write_events(tmp_path / "events" / "2.json", [event("d9", 3000, 9999)])
            eventually(lambda: served(["d9"])["d9"] == 9999, "the last event", _STREAM_SECONDS)
            process.send_signal(signal.SIGTERM)
            assert process.wait(_STREAM_SECONDS) == 0
        assert served() == expected | {"d7": -1, "d9": 9999}


def write_events(path: Path, events: Sequence[Event]) -> None:
    """Create a file of events atomically."""
    path.parent.mkdir(exist_ok=True)
    aside = path.with_name(f"_{path.name}")
    aside.write_text("\n".join(map(json.dumps, events)))
    aside.rename(path)


def test_deltas_of_a_stream_from_kafka_that_is_killed(tmp_path: Path) -> None:
    """One view has the newest event of each key, the other counts the events of each key."""
    pytest.importorskip("confluent_kafka")
    from tests import kafka

    if not kafka.BROKER.is_dir():
        pytest.skip("there is no broker; `make .kafka/installed` fetches it")
    events = [event(f"d{number % 40}", number, number % 7) for number in range(500)]
    records = [json.dumps(made).encode() for made in events]
    with kafka.broker() as address:
        kafka.create_topic(address, "events", 3)
        options = {
            "kafka.bootstrap.servers": address,
            "subscribe": "events",
            "startingOffsets": "earliest",
            "maxOffsetsPerTrigger": 120,
        }
        source = {"format": "kafka", "options": options, "columns": COLUMNS}
        counted = "SELECT doc_id, count(*) AS events, sum(clicks) AS clicks, max(at) AS at FROM events"
        counting = source | {
            "event_time": "at",
            "watermark": "10m",
            "sql": f"{counted} GROUP BY doc_id, window(at, '1 hour')",
        }
        views = [view("newest", ["clicks"], source), view("hourly", ["events", "clicks"], counting)]
        (tmp_path / "views.yaml").write_text(yaml.safe_dump({"views": views}))
        to = ("--to", "root", "--package", kafka.CONNECTOR)
        kafka.produce(address, "events", records[:300])
        stream(tmp_path, *to, die_at="stream.published:3")
        kafka.produce(address, "events", records[300:])
        stream(tmp_path, *to, "--snapshot-every", "4", die_at="stream.consolidated")
        stream(tmp_path, *to)
    root = ExportRoot(tmp_path / "root")
    for name in ("newest", "hourly"):
        entries = [root.entry(name, seq) for seq in root.sequence_numbers(name)]
        # A snapshot after deltas contains the same batch as the last of these deltas.
        batches = [entry.stream for entry in entries if entry.seq == 1 or entry.kind == "delta"]
        assert len({batch.batch for batch in batches if batch}) == len(batches) > 3
    stores.load(tmp_path / "store", root)
    keys = [f"d{number}" for number in range(40)]
    found = FeatureStore.open(tmp_path / "store").lookup(["newest:*", "hourly:*"], {"doc_id": keys}).to_pydict()
    of = {key: [made for made in events if made["doc_id"] == key] for key in keys}
    assert found["newest:clicks"] == [of[key][-1]["clicks"] for key in keys]
    assert found["hourly:events"] == [len(of[key]) for key in keys]
    assert found["hourly:clicks"] == [sum(made["clicks"] for made in of[key]) for key in keys]
