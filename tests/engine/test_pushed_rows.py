"""Rows from clients are converted exactly to the rows that the writer takes, or they are refused."""

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from shoal.engine.base.errors import PushInvalid
from shoal.engine.base.times import LAST_TIME
from shoal.engine.format.keys import KEY_HASH, KEY_HASH_2, key_identity
from shoal.engine.push.pushed_rows import (
    deleted_rows,
    deserialize_rows,
    from_base64,
    pushed_rows,
    serialize_rows,
)
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.root.manifest import EVENT_TIMESTAMP, TOMBSTONE
from shoal.engine.store.version import ViewVersion
from shoal.loaders.commit.store_writer import StoreWriter
from tests import stores
from tests.every_type import ITEMS, item_rows

NOW = datetime(2026, 1, 2, tzinfo=UTC)


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> ViewVersion:
    """The view with a feature of every type."""
    directory = tmp_path_factory.mktemp("pushed")
    root = ExportRoot(directory / "root")
    stores.publish_snapshot(root, ITEMS, item_rows(3))
    stores.load(directory / "store", root)
    with StoreWriter(directory / "store") as writer:
        return writer.version().view(ITEMS.name)


def of_type(view: ViewVersion, wanted: str) -> str:
    return next(feature.name for feature in view.record.view_schema.features if feature.type == wanted)


def pushed(view: ViewVersion, wanted: str, values: Any) -> list[Any]:
    rows = pushed_rows(
        view, {view.join_keys[0].name: [f"k{n}" for n in range(len(values))], of_type(view, wanted): values}, now=NOW
    )
    made: list[Any] = rows.column(of_type(view, wanted)).to_pylist()
    return made


def test_keys_are_hashed_and_times_are_now(view: ViewVersion) -> None:
    (rows,) = deserialize_rows(
        serialize_rows([pushed_rows(view, {view.join_keys[0].name: ["a"], of_type(view, "int32"): [1]}, now=NOW)])
    )
    assert (rows.column(KEY_HASH)[0].as_py(), rows.column(KEY_HASH_2)[0].as_py()) == key_identity(["a"])
    assert rows.column(EVENT_TIMESTAMP).to_pylist() == [NOW]
    assert rows.column(TOMBSTONE).to_pylist() == [False]
    gone = deleted_rows(
        view, {view.join_keys[0].name: ["a"], "event_timestamp": ["2026-01-01T01:00:00+01:00"]}, now=NOW
    )
    assert gone.column(TOMBSTONE).to_pylist() == [True]
    assert gone.column(EVENT_TIMESTAMP).to_pylist() == [datetime(2026, 1, 1, tzinfo=UTC)]


@pytest.mark.parametrize(
    ("wanted", "given", "made"),
    [
        ("int32", [1, None, -5], [1, None, -5]),
        ("int32", [1.0, 2.0], [1, 2]),
        ("int64", np.array([1, 2], np.int16), [1, 2]),
        ("int64", [2**63 - 1], [2**63 - 1]),
        ("float32", [1, 0.5, None], [1.0, 0.5, None]),
        ("float32", [float("inf"), float("nan")], [float("inf"), pytest.approx(float("nan"), nan_ok=True)]),
        ("float64", [1, 0.1], [1.0, 0.1]),
        ("bool", [True, None], [True, None]),
        ("string", ["", "é", None], ["", "é", None]),
        ("string", pa.array(["x"], pa.large_string()), ["x"]),
        ("bytes", [b"\0\xff", None], [b"\0\xff", None]),
        ("timestamp", ["2026-01-01", None], [datetime(2026, 1, 1, tzinfo=UTC), None]),
        ("timestamp", [datetime(2026, 1, 1)], [datetime(2026, 1, 1, tzinfo=UTC)]),
        ("timestamp", pa.array([1], pa.timestamp("s")), [datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC)]),
        ("list<int64>", [[1, 2], [], None], [[1, 2], [], None]),
        ("list<float32>", [[1, 0.5], []], [[1.0, 0.5], []]),
        ("list<string>", [["a", ""], [], None], [["a", ""], [], None]),
        ("float32[3]", [[1, 2, 3], None], [[1.0, 2.0, 3.0], None]),
        ("float32[3]", np.zeros((2, 3)).tolist(), [[0.0] * 3] * 2),
    ],
)
def test_values_that_fit_are_taken(view: ViewVersion, wanted: str, given: Any, made: list[Any]) -> None:
    assert pushed(view, wanted, given) == made


@pytest.mark.parametrize(
    ("wanted", "given"),
    [
        ("int32", [2**31]),
        ("int32", [1.5]),
        ("int32", [True]),
        ("int32", ["1"]),
        ("int64", [2**63]),
        ("int64", [1, "x"]),
        ("float32", [1e300]),
        ("float32", [True]),
        ("float32", [{}]),
        ("float64", [2**60 + 1]),
        ("bool", [1]),
        ("string", [1]),
        ("string", ["\ud800"]),
        ("string", [b"x"]),
        ("string", ["x" * (1 << 24)]),
        ("bytes", ["x"]),
        ("timestamp", [1]),
        ("timestamp", ["yesterday"]),
        ("timestamp", [[]]),
        ("list<int64>", [[1, None]]),
        ("list<int64>", [[1.5]]),
        ("list<int64>", [1]),
        ("list<int64>", [[[1]]]),
        ("list<string>", [["x" * (1 << 20)] * 17]),
        ("float32[3]", [[1, 2]]),
        ("float32[3]", [[1, 2, None]]),
        ("float32[3]", [[]]),
    ],
)
def test_values_that_do_not_fit_are_refused(view: ViewVersion, wanted: str, given: list[Any]) -> None:
    with pytest.raises(PushInvalid, match=f"column '{of_type(view, wanted)}'"):
        pushed(view, wanted, given)


OUTSIDE = [
    ("0000-12-31T23:59:59Z", "'0000-12-31T23:59:59Z'"),
    ("10000-01-01", "'10000-01-01'"),
    ("+12026-01-01T00:00:00Z", r"'\+12026"),
    ("0001-01-01T00:00:00+14:00", "0000-12-31T10:00:00"),
    (datetime(9999, 12, 31, 23, tzinfo=timezone(timedelta(hours=-2))), "10000-01-01T01:00:00"),
    (pa.array([None, 10**15], pa.timestamp("s")), "1000000000000000000000 microseconds"),
    (pa.array([None, 253402300800000], pa.timestamp("ms", "Asia/Tokyo")), "10000-01-01T00:00:00"),
    (pa.array([None, -62135596800000001], pa.timestamp("us", "UTC")), "0000-12-31T23:59:59.999999"),
    (np.array(["NaT", "12000-01-01"], "M8[s]"), "12000-01-01T00:00:00"),
]


@pytest.mark.parametrize(("given", "shown"), OUTSIDE)
def test_a_time_outside_the_years_1_to_9999_is_refused(view: ViewVersion, given: Any, shown: str) -> None:
    name = of_type(view, "timestamp")
    values = given if not isinstance(given, str | datetime) else [None, given]
    with pytest.raises(PushInvalid, match=f"column '{name}' holds {shown}.* in row 1; give times in the years 1 to"):
        pushed(view, "timestamp", values)
    events = [NOW, given] if isinstance(given, str | datetime) else pc.fill_null(pa.array(given), 0)
    keys = {view.join_keys[0].name: ["a", "b"], "event_timestamp": events}
    for make, columns in ((pushed_rows, {of_type(view, "int32"): [1, 2]}), (deleted_rows, {})):
        with pytest.raises(PushInvalid, match=f"column 'event_timestamp' holds {shown}.* in row 1; give times in"):
            make(view, keys | columns, now=NOW)
    # The writer does not rely on the checks of a worker.
    rows = pushed_rows(view, {view.join_keys[0].name: ["a"], name: [NOW]}, now=NOW)
    for column in (name, EVENT_TIMESTAMP):
        late = pa.array([LAST_TIME + 1], pa.timestamp("us", "UTC"))
        wrong = rows.set_column(rows.schema.get_field_index(column), column, late)
        with pytest.raises(PushInvalid, match=f"column '{column}' holds 10000-01-01T00:00:00.000000Z in row 0"):
            deserialize_rows(serialize_rows([wrong]))


def test_the_first_and_the_last_time_are_taken(view: ViewVersion) -> None:
    times = [datetime(1, 1, 1, tzinfo=UTC), datetime.max.replace(tzinfo=UTC)]
    assert pushed(view, "timestamp", times) == times
    assert pushed(view, "timestamp", [time.isoformat() for time in times]) == times


def test_an_event_time_more_than_a_day_ahead_is_refused(view: ViewVersion) -> None:
    keys = {view.join_keys[0].name: ["a", "b"]}
    day = NOW + timedelta(days=1)
    for make, columns in ((pushed_rows, {of_type(view, "int32"): [1, 2]}), (deleted_rows, {})):
        make(view, keys | columns | {"event_timestamp": [NOW, day]}, now=NOW)
        late = [NOW, day + timedelta(microseconds=1)]
        with pytest.raises(PushInvalid, match=r"2026-01-03T00:00:00\.000001Z in row 1, more than a day"):
            make(view, keys | columns | {"event_timestamp": late}, now=NOW)


def test_many_rows_of_lists_are_not_one_long_value(view: ViewVersion) -> None:
    assert len(pushed(view, "list<string>", [["x" * (1 << 20)]] * 20)) == 20


@pytest.mark.parametrize(
    "body", [b"x", b"\xff\xff\xff\xff\x10\0\0\0", serialize_rows([pa.record_batch({"a": [1]})])[:-20]]
)
def test_what_is_no_arrow_is_refused(body: bytes) -> None:
    with pytest.raises(PushInvalid, match="not an Arrow stream"):
        deserialize_rows(body)


def test_base64_is_read_strictly() -> None:
    assert from_base64("b", ["AP8=", None, ""]) == [b"\0\xff", None, b""]
    for wrong in (["A"], ["A P8="], [5], ["é"]):
        with pytest.raises(PushInvalid, match="column 'b' must be bytes in base64"):
            from_base64("b", wrong)
