"""Times outside the years 1 to 9999: how they are found, and what lookups answer if a store already holds them."""

import io
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pytest
from click.testing import CliRunner

from shoal import FeatureStore
from shoal.cli import shoal
from shoal.engine.base.times import (
    FIRST_TIME,
    LAST_TIME,
    from_seconds,
    later_than,
    outside_range,
    shown_time,
    time_before,
    to_datetime,
    to_micros,
)
from shoal.engine.encoders import arrow_stream, feast_protobuf, json_feast, json_lookup, npy
from shoal.engine.lookup.explain import explain
from shoal.engine.lookup.result import LookupResult
from shoal.engine.push.pushed_rows import pushed_rows
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.root.manifest import EVENT_TIMESTAMP
from shoal.engine.status.store import describe_version
from shoal.loaders.apply.compaction import fold
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.push.push import Push, push, push_rows
from tests import stores

FIRST = datetime(1, 1, 1, tzinfo=UTC)
LAST = datetime.max.replace(tzinfo=UTC)
VIEW = stores.schema("doc", key="int64", ttl=timedelta(days=7), n="int64", at="timestamp")
OUTSIDE = [FIRST_TIME - 1, LAST_TIME + 1, -(2**63), 2**63 - 1, -(2**63) + 1]
ANSWERED = [FIRST, LAST, FIRST, LAST, FIRST]
KEYS = list(range(len(OUTSIDE) + 1))


def test_the_range_is_that_of_python() -> None:
    assert (to_micros(FIRST), to_micros(LAST)) == (FIRST_TIME, LAST_TIME)
    assert [to_datetime(time) for time in [FIRST_TIME, *OUTSIDE, LAST_TIME, 0]] == [
        FIRST,
        *ANSWERED,
        LAST,
        datetime(1970, 1, 1, tzinfo=UTC),
    ]


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_the_first_time_outside_is_found_in_any_unit(unit: str) -> None:
    scale = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
    first = FIRST_TIME * scale // 10**6
    last = LAST_TIME * scale // 10**6
    kind = pa.timestamp(unit, tz="+14:00")
    if unit == "ns":
        # All times of an int64 in nanoseconds are between the years 1677 and 2262.
        assert outside_range(pa.array([-(2**63), None, 2**63 - 1], kind)) is None
        return
    assert outside_range(pa.array([first, None, 0, last], kind)) is None
    assert outside_range(pa.array([None, first, first - 1, last + 1], kind)) == (2, (first - 1) * 10**6 // scale)
    assert outside_range(pa.array([first - 1, last + 1], kind).slice(1)) == (0, (last + 1) * 10**6 // scale)
    assert outside_range(pa.array([], kind)) is None
    assert outside_range(pa.array([None], kind)) is None


def test_times_are_shown_wherever_they_lie() -> None:
    assert shown_time(LAST_TIME + 1) == "10000-01-01T00:00:00.000000Z"
    assert shown_time(FIRST_TIME - 1) == "0000-12-31T23:59:59.999999Z"
    assert shown_time(10**21) == "1000000000000000000000 microseconds since 1970"
    assert shown_time(-(2**63)) == f"{-(2**63)} microseconds since 1970"


def test_other_arithmetic_stays_in_int64() -> None:
    assert from_seconds(10**15) is None
    assert from_seconds(-(10**15)) is None
    assert from_seconds(LAST_TIME // 10**6) == LAST.replace(microsecond=0)
    assert [time_before(0, 10**30), time_before(0, -(10**30)), time_before(10, 3)] == [-(2**63), 2**63 - 1, 7]
    times = pa.array([0, None, 10], pa.timestamp("us"))
    assert later_than(times, to_datetime(9)) == (2, 10)
    assert later_than(times, to_datetime(10)) is None


# --- a store that holds such times -----------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["overlay", "base"])
def old_store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store as it could be written before times were checked. The last key has an ordinary time."""
    directory = tmp_path_factory.mktemp("old")
    root = ExportRoot(directory / "root")
    store = directory / "store"
    stores.publish_snapshot(root, VIEW, [])
    stores.load(store, root)
    with StoreWriter(store) as writer:
        for times in ({EVENT_TIMESTAMP, "at"}, {EVENT_TIMESTAMP}, {"at"}):
            _write_unchecked(writer, times)
        if request.param == "base":
            fold(writer, "doc")
    return store


def _write_unchecked(writer: StoreWriter, outside: set[str]) -> None:
    """Write rows with times outside the range in the columns `outside`. The last key keeps its ordinary time."""
    version = writer.version().view("doc")
    now = datetime.now(UTC)
    keys = [10 * number + len(outside) + ("at" in outside) for number in KEYS]
    columns = {"doc_id": keys, "n": KEYS, "at": [now] * len(KEYS), "event_timestamp": [now] * len(KEYS)}
    rows = pushed_rows(version, columns, now=now)
    for name in outside:
        column = rows.column(name)
        rows = rows.set_column(
            rows.schema.get_field_index(name), name, pa.array([*OUTSIDE, column[-1].value], column.type)
        )
    push(writer, "doc", [Push([rows])])


FEATURES = ["doc:n", "doc:at"]
OF_BOTH, OF_EVENT_TIME, OF_FEATURE = ([10 * number + kind for number in KEYS] for kind in (3, 1, 2))


def looked_up(store: Path, keys: list[int], **how: Any) -> LookupResult:
    return FeatureStore.open(store).lookup(FEATURES, {"doc_id": keys}, **({"max_age": timedelta.max} | how))


@pytest.mark.parametrize("keys", [OF_BOTH, OF_EVENT_TIME, OF_FEATURE], ids=["both", "event time", "feature"])
def test_every_format_answers_the_nearest_time_in_the_range(old_store: Path, keys: list[int]) -> None:
    result = looked_up(old_store, keys)
    events = ANSWERED if keys is not OF_FEATURE else None
    values = ANSWERED if keys is not OF_EVENT_TIME else None
    assert result.to_pydict()["doc:n"] == KEYS
    document = orjson.loads(json_lookup.encode(result))
    assert document["status"]["doc"] == ["PRESENT"] * len(keys)
    texts = [time.isoformat().replace("+00:00", "Z") for time in ANSWERED]
    if events:
        assert document["event_timestamps"]["doc"][:-1] == texts
        assert result.views["doc"].event_timestamps.tolist()[:-1] == [time.replace(tzinfo=None) for time in events]
    if values:
        assert document["features"]["doc:at"][:-1] == texts
        assert result.to_pydict()["doc:at"][:-1] == values
        assert result.to_arrow().column("doc:at").to_pylist()[:-1] == values
        assert pa.ipc.open_stream(arrow_stream.encode(result)).read_all()["doc:at"].to_pylist()[:-1] == values
        strict = orjson.loads(json_feast.encode(result, {"doc_id": keys}, strict=True))
        seconds = [FIRST_TIME // 10**6, LAST_TIME // 10**6]
        assert strict["results"][2]["values"][:2] == seconds
        matrix = FeatureStore.open(old_store).lookup_matrix(FEATURES, {"doc_id": keys}, max_age=timedelta.max)
        assert np.load(io.BytesIO(npy.encode(matrix)))[:2, 1].tolist() == [FIRST_TIME / 1e6, LAST_TIME / 1e6]
        assert result.to_numpy(np.float64)[:2, 1].tolist() == [FIRST_TIME / 1e6, LAST_TIME / 1e6]
    assert feast_protobuf.encode(result, {})


def test_rows_before_the_range_are_as_old_as_can_be(old_store: Path) -> None:
    statuses = orjson.loads(json_lookup.encode(looked_up(old_store, OF_EVENT_TIME, max_age=None)))["status"]["doc"]
    assert statuses == ["OUTSIDE_MAX_AGE", "PRESENT", "OUTSIDE_MAX_AGE", "PRESENT", "OUTSIDE_MAX_AGE", "PRESENT"]


def test_any_max_age_can_be_asked_for(old_store: Path) -> None:
    for age in (timedelta.max, timedelta(0), timedelta(microseconds=1)):
        for method in (FeatureStore.lookup, FeatureStore.lookup_matrix):
            assert method(FeatureStore.open(old_store), FEATURES, {"doc_id": OF_BOTH}, max_age=age)


def test_the_command_line_shows_such_rows(old_store: Path) -> None:
    keys = [part for key in OF_BOTH for part in ("--key", f"doc_id={key}")]
    for form in ("table", "json", "csv"):
        for options in (["--max-age", "9999999w"], ["--stale", "serve"]):
            more = [] if form == "csv" else ["--explain"]
            arguments = ["lookup", "--store", str(old_store), "--features", "doc:*", "--format", form, *more, *options]
            done = CliRunner().invoke(shoal, [*arguments, *keys])
            assert done.exit_code == 0, done.output
            assert "9999-12-31T23:59:59.999999Z" in done.output
            assert "0001-01-01T00:00:00Z" in done.output
    status = CliRunner().invoke(shoal, ["status", "--store", str(old_store), "--json"])
    assert status.exit_code == 0, status.output
    (view,) = json.loads(status.output)["views"]
    assert view["watermark"] == "9999-12-31T23:59:59.999999Z"
    assert view["freshness_seconds"] == 0


def test_histories_and_status_tell_the_nearest_time(old_store: Path) -> None:
    version = FeatureStore.open(old_store).version()
    histories = explain(old_store, version, "doc", {"doc_id": OF_BOTH})
    assert [history[0].event_time for history in histories[:-1]] == ANSWERED
    assert describe_version(version)["views"][0]["watermark"] == "9999-12-31T23:59:59.999999Z"


def test_a_push_of_some_features_keeps_the_nearest_time(tmp_path: Path) -> None:
    root = ExportRoot(tmp_path / "root")
    store = tmp_path / "store"
    stores.publish_snapshot(root, VIEW, [])
    stores.load(store, root)
    with StoreWriter(store) as writer:
        _write_unchecked(writer, {"at"})
        push_rows(writer, "doc", {"doc_id": OF_FEATURE, "n": [7] * len(KEYS)})
        fold(writer, "doc")
    found = looked_up(store, OF_FEATURE).to_pydict()
    assert found["doc:n"] == [7] * len(KEYS)
    assert found["doc:at"][:-1] == ANSWERED


def test_a_time_to_live_as_long_as_can_be_keeps_pushed_rows(tmp_path: Path) -> None:
    view = VIEW.model_copy(update={"ttl": timedelta.max})
    root = ExportRoot(tmp_path / "root")
    stores.publish_snapshot(root, view, [])
    stores.load(tmp_path / "store", root)
    with StoreWriter(tmp_path / "store") as writer:
        push_rows(writer, "doc", {"doc_id": [1], "n": [5]})
    stores.publish_snapshot(root, view, [{"doc_id": 2, "n": 6}])
    stores.load(tmp_path / "store", root)
    found = FeatureStore.open(tmp_path / "store").lookup(["doc:n"], {"doc_id": [1, 2]})
    assert found.to_pydict()["doc:n"] == [5, 6]
