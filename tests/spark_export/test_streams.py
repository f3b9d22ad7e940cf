"""Streams in one Spark session: the entries of batches, the owner of a log, and events that cannot be published."""

import json
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from shoal import FeatureStore
from shoal.engine.base.errors import (
    LogTaken,
    RemovalRefused,
    SchemaChangeRefused,
    ShoalError,
    SourceError,
    StreamFailed,
)
from shoal.engine.base.server_access import ServerAccess
from shoal.loaders.backup.verify import verify_root
from shoal.spark_export.exporter import export
from shoal.spark_export.stream.log import StreamLog
from shoal.spark_export.stream.pushing import StreamPushes
from shoal.spark_export.stream.running import BatchReport, Sink, Streams
from tests import stores
from tests.spark_export.lab import VIEW, Lab

HOUR = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(hours=3)
EVENTS = {"format": "json", "path": "events", "columns": "doc_id STRING, event_timestamp TIMESTAMP, clicks BIGINT"}


def event(key: str | None, clicks: int | None, **after: float) -> dict[str, Any]:
    """Return an event at some time after the hour."""
    return {"doc_id": key, "event_timestamp": (HOUR + timedelta(**after)).isoformat(), "clicks": clicks}


@pytest.fixture
def events(lab: Lab) -> Path:
    directory = lab.directory / "events"
    directory.mkdir()
    return directory


def put(events: Path, *rows: dict[str, Any]) -> None:
    """Add a file with events."""
    number = len(list(events.iterdir()))
    (events / f"{number}.json").write_text("\n".join(map(json.dumps, rows)))


def define(lab: Lab, features: dict[str, str] | None = None, **stream: Any) -> None:
    lab.define(features or {"clicks": "int64"}, source=None, stream=EVENTS | stream)


def run(
    lab: Lab,
    *,
    checkpoint: str = "checkpoint",
    snapshot_every: int = 1000,
    take_over: bool = False,
    sink: Sink | None = None,
) -> list[int]:
    """Run the stream until it has read all events, and return the number of rows of each batch."""
    reports: list[BatchReport] = []
    (view,) = lab.views().views
    streams = Streams(lab.spark, f"file://{lab.directory / checkpoint}", reports.append)
    sink = sink or StreamLog(view, lab.root, lab.spark, snapshot_every=snapshot_every, take_over=take_over)
    streams.run([(view, sink)], every_seconds=0, once=True, stopped=threading.Event())
    return [report.rows for report in reports]


def clicks(lab: Lab) -> dict[str, int]:
    """Return the clicks that a node serves after it followed the log."""
    return {str(key): row["clicks"] for (key,), row in lab.served().items()}


def test_a_stream_is_read_from_the_path_as_it_is_written(lab: Lab) -> None:
    events = lab.directory / "events [1]{a}"
    events.mkdir()
    define(lab, path=events.name)
    put(events, event("a", 1, minutes=1))
    assert run(lab) == [1]
    assert clicks(lab) == {"a": 1}


def test_the_newest_event_of_a_key_is_served(lab: Lab, events: Path) -> None:
    define(lab)
    put(events, event("a", 1, minutes=1), event("b", 2, minutes=1), event("a", 3, minutes=2), event("a", 4, minutes=1))
    assert run(lab) == [2]
    assert clicks(lab) == {"a": 3, "b": 2}
    put(events, event("a", 5, minutes=1), event("c", None, minutes=1))
    assert run(lab) == [2]
    assert clicks(lab) == {"a": 3, "b": 2, "c": None}
    first, second = (lab.root.entry(VIEW, seq) for seq in (1, 2))
    assert (first.kind, second.kind) == ("snapshot", "delta")
    assert first.watermark == second.watermark == HOUR + timedelta(minutes=2)
    assert first.stream is not None
    assert second.stream is not None
    assert (first.stream.query, first.stream.batch + 1) == (second.stream.query, second.stream.batch)


@pytest.mark.parametrize(
    ("time", "shown"),
    [
        (
            "0001-01-01T00:00:00+14:00",
            "must lie in the years 1 to 9999.* event time 0000-12-31T10:00:00.000000Z, doc_id b",
        ),
        (
            "9999-12-31T23:00:00-02:00",
            "must lie in the years 1 to 9999.* event time 10000-01-01T01:00:00.000000Z, doc_",
        ),
        (
            "5000-01-01T00:00:00Z",
            "unless the view has `future: allow`, but 1 .* event time 5000-01-01T00:00:00.000000Z",
        ),
    ],
)
def test_an_event_of_an_impossible_time_stops_the_stream(lab: Lab, events: Path, time: str, shown: str) -> None:
    define(lab)
    put(events, event("a", 1), event("b", 2) | {"event_timestamp": time})
    with pytest.raises(SourceError, match=shown):
        run(lab)
    assert lab.seqs() == []


def test_events_of_the_future_are_published_where_the_view_says_so(lab: Lab, events: Path) -> None:
    lab.define({"clicks": "int64"}, source=None, stream=EVENTS, future="allow")
    put(events, event("a", 1, days=400))
    assert run(lab) == [1]
    assert clicks(lab) == {"a": 1}


def test_events_are_counted_by_the_hour_and_late_ones_are_left_out(lab: Lab, events: Path) -> None:
    query = "SELECT doc_id, count(*) AS clicks, max(event_timestamp) AS event_timestamp FROM events"
    define(
        lab,
        sql=f"{query} GROUP BY doc_id, window(event_timestamp, '1 hour')",
        event_time="event_timestamp",
        watermark="10m",
    )
    put(events, event("a", 1, minutes=1), event("a", 1, minutes=2), event("b", 1, minutes=3))
    run(lab)
    assert clicks(lab) == {"a": 2, "b": 1}
    put(events, event("a", 1, minutes=5), event("b", 1, minutes=62))
    run(lab)
    assert clicks(lab) == {"a": 3, "b": 1}
    # The hour of the first events has ended, and so has the allowed delay for late events.
    put(events, event("c", 1, minutes=90))
    run(lab)
    put(events, event("a", 1, minutes=6), event("a", 1, minutes=85))
    run(lab)
    assert clicks(lab) == {"a": 1, "b": 1, "c": 1}
    counted = [row["clicks"] for seq in lab.seqs() for row in lab.published(lab.root.entry(VIEW, seq))[0].values()]
    assert max(counted) == 3


def test_a_batch_that_spark_gives_again_is_published_once(lab: Lab, events: Path) -> None:
    define(lab)
    put(events, event("a", 1, minutes=1))
    run(lab)
    put(events, event("a", 2, minutes=2))
    run(lab)
    # Without the commit file, Spark repeats the batch, as after a stream that was killed while it published.
    for path in (lab.directory / "checkpoint" / VIEW / "commits").glob("*1*"):
        path.unlink()
    put(events, event("a", 3, minutes=3))
    run(lab)
    assert lab.seqs() == [1, 2, 3]
    assert clicks(lab) == {"a": 3}


def test_a_log_has_one_author_at_a_time(lab: Lab, events: Path) -> None:
    lab.define({"clicks": "int64"}, stream=EVENTS)
    lab.put([{"doc_id": "x", "event_timestamp": HOUR, "clicks": 9}])
    lab.export()
    put(events, event("a", 1, minutes=1))
    with pytest.raises(LogTaken, match=r"newest entry, 1, is of an export, .*--take-over"):
        run(lab)
    run(lab, take_over=True)
    assert clicks(lab) == {"x": 9, "a": 1}
    with pytest.raises(LogTaken, match=r"newest entry, 2, is of the stream [0-9a-f-]{36}, .*--full"):
        lab.export()
    put(events, event("b", 2, minutes=1))
    with pytest.raises(LogTaken, match="is of the stream"):
        run(lab, checkpoint="another")
    run(lab)
    assert clicks(lab) == {"x": 9, "a": 1, "b": 2}
    # The stream's deltas do not contain the number of rows, but the export before them does.
    lab.put([])
    with pytest.raises(RemovalRefused, match="1 of 1 rows would be removed"):
        lab.export(full=True)
    lab.put([{"doc_id": "x", "event_timestamp": HOUR, "clicks": 9}])
    assert lab.export(full=True).kind == "snapshot"
    assert clicks(lab) == {"x": 9}
    assert lab.export().kind is None


def test_a_long_log_becomes_a_snapshot_and_what_is_older_goes(lab: Lab, events: Path, tmp_path: Path) -> None:
    lab.define({"clicks": "int64"}, stream=EVENTS)
    lab.put([{"doc_id": key, "event_timestamp": HOUR, "clicks": 9} for key in "xy"])
    lab.export()
    lab.put([{"doc_id": "x", "event_timestamp": HOUR, "clicks": 9}])
    lab.export()
    assert lab.newest().tombstones == 1
    stores.load(tmp_path / "behind", lab.root)
    for minute in range(1, 5):
        put(events, event("a", minute, minutes=minute), event(f"b{minute}", minute, minutes=9 - minute))
        run(lab, take_over=True, snapshot_every=2)
    kinds = [lab.root.entry(VIEW, seq).kind for seq in lab.seqs()]
    # Deltas 2 and 3 led to snapshot 4, and deltas 5 and 6 to snapshot 7. The entries before 4 are deleted.
    assert (lab.seqs(), kinds) == ([4, 5, 6, 7, 8], ["snapshot", "delta", "delta", "snapshot", "delta"])
    expected = {"x": 9, "a": 4} | {f"b{minute}": minute for minute in range(1, 5)}
    assert clicks(lab) == expected
    assert [lab.root.entry(VIEW, seq).live_rows for seq in lab.seqs()] == [3, None, None, 5, None]
    assert lab.root.entry(VIEW, 7).values == {"clicks": 5}
    assert [checked for checked in verify_root(lab.root) if checked.problem] == []
    stores.load(tmp_path / "behind", lab.root)
    keys = [*expected, "y"]
    found = FeatureStore.open(tmp_path / "behind").lookup(["docs:clicks"], {"doc_id": keys}).to_pydict()
    assert found["docs:clicks"] == [*expected.values(), None]


def test_a_log_of_which_rows_are_missing_is_not_made_short(lab: Lab, events: Path) -> None:
    define(lab)
    put(events, *(event(f"a{number}", number, minutes=1) for number in range(9)), event("none", None, minutes=1))
    run(lab)
    assert (lab.newest().live_rows, lab.newest().values) == (10, {"clicks": 9})
    lost = lab.root.directory(lab.newest()) / lab.newest().files[0].path
    content = lost.read_bytes()
    lost.write_bytes(b"damaged")
    put(events, event("a0", 7, minutes=2))
    lab.spark.conf.set("spark.sql.files.ignoreCorruptFiles", "true")
    try:
        with pytest.raises(StreamFailed, match=r"at least 10 rows, but Spark read only \d+; no snapshot"):
            run(lab, snapshot_every=1)
    finally:
        lab.spark.conf.unset("spark.sql.files.ignoreCorruptFiles")
    assert lab.seqs() == [1, 2]
    lost.write_bytes(content)
    put(events, event("a1", 8, minutes=2))
    run(lab, snapshot_every=1)
    assert (lab.newest().kind, lab.newest().live_rows, lab.newest().values) == ("snapshot", 10, {"clicks": 9})


def test_an_export_publishes_the_definition_of_a_view_that_only_streams(lab: Lab, events: Path) -> None:
    define(lab)
    for _ in range(2):
        assert export(lab.views(), lab.root, spark=lab.spark) == []
    assert [(lab.newest().seq, lab.newest().kind, lab.newest().rows)] == [(1, "snapshot", 0)]
    put(events, event("a", 1, minutes=1))
    run(lab)
    assert clicks(lab) == {"a": 1}
    assert export(lab.views(), lab.root, spark=lab.spark) == []
    assert lab.seqs() == [1, 2]


def test_other_features_are_refused(lab: Lab, events: Path) -> None:
    define(lab)
    put(events, event("a", 1, minutes=1))
    run(lab)
    define(lab, {"clicks": "int64", "more": "int64"}, sql="SELECT *, 1L AS more FROM events")
    put(events, event("a", 2, minutes=2))
    with pytest.raises(SchemaChangeRefused, match="give the view another name"):
        run(lab)


@pytest.mark.parametrize(
    ("stream", "error", "said"),
    [
        ({}, SourceError, r"column 'doc_id' .* must not be null, but 1 row\(s\) .* 2026|doc_id None, which has null"),
        ({"sql": "SELECT * FROM nothing"}, SourceError, r"stream of json .*events cannot be read: .*nothing"),
        ({"columns": "doc_id STRING, clicks BIGINT"}, SourceError, r"has no column 'event_timestamp'"),
        ({"path": "elsewhere"}, ShoalError, r"elsewhere"),
    ],
    ids=["null key", "no such table", "no such column", "no such directory"],
)
def test_what_cannot_be_published_is_named(
    stream: dict[str, Any], error: type[Exception], said: str, lab: Lab, events: Path
) -> None:
    define(lab, **stream)
    put(events, event(None, 1, minutes=1), event("b", 1, minutes=1))
    with pytest.raises(error, match=said):
        run(lab)
    assert lab.root.views() == []
    # With a query that leaves such events out, the stream continues where it stopped.
    define(lab, sql="SELECT * FROM events WHERE doc_id IS NOT NULL")
    run(lab)
    assert clicks(lab) == {"b": 1}


def test_a_stream_that_waits_for_a_server_can_be_stopped(lab: Lab, events: Path) -> None:
    define(lab)
    put(events, event("a", 1, minutes=1))
    stopped = threading.Event()
    said: list[str] = []

    def tell(sentence: str) -> None:
        said.append(sentence)
        stopped.set()

    (view,) = lab.views().views
    # Nothing listens at this address.
    sink = StreamPushes(view, "http://127.0.0.1:1", ServerAccess(), tell, stopped.is_set)
    with pytest.raises(StreamFailed, match="stopped while"):
        run(lab, sink=sink)
    assert ["does not accept pushes now" in sentence for sentence in said] == [True]
