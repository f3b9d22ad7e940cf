"""Pushed rows: whatever was pushed, published, folded or taken back, the store serves what a plain model says."""

import asyncio
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine import FeatureStore
from engine.errors import PushInvalid, SchemaChangeRefused, UnknownFeature
from engine.export_root import ExportRoot
from engine.pushed_rows import deleted_rows, pushed_rows
from loaders import request_log
from loaders.apply import follow_again, roll_back
from loaders.compaction import MAX_OVERLAYS, fold, merge_overlays
from loaders.definition import define_view, drop_view
from loaders.load import catch_up
from loaders.push import Push, Pushed, push, push_rows
from loaders.push_queue import PushQueue
from loaders.request_log import Applied
from loaders.store_writer import StoreWriter
from loaders.verify import verify_store
from tests import stores
from tests.stores import NOW, TIMESTAMP, Row

VIEW = stores.schema("doc", key="int64", a="int64", text="string", vector="float32[2]", tags="list<string>")
KEYS = list(range(10))
FEATURES = ["a", "text", "vector", "tags"]
VALUES = {
    "a": st.none() | st.integers(-5, 5),
    "text": st.none() | st.sampled_from(["", "x", "long " * 20]),
    "vector": st.none() | st.lists(st.integers(0, 3).map(float), min_size=2, max_size=2),
    "tags": st.none() | st.lists(st.sampled_from(["p", "q"]), max_size=3),
}
MINUTES = st.integers(-20, 20)
KEY_TIMES = st.dictionaries(st.sampled_from(KEYS), MINUTES, min_size=1, max_size=5)


def at(minutes: int) -> datetime:
    return NOW + timedelta(minutes=minutes)


def columns(rows: list[Row]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}


@dataclass(frozen=True)
class Known:
    """What the store holds of a key; `values` is None once it was deleted."""

    time: datetime
    values: Row | None
    pushed: bool


class Model:
    """The rules, a key at a time."""

    def __init__(self) -> None:
        self.keys: dict[int, Known] = {}

    def push(self, row: Row) -> bool:
        """Whether the row was taken."""
        key, time = row["doc_id"], row[TIMESTAMP]
        old = self.keys.get(key)
        if old is not None and time < old.time:
            return False
        before = old.values if old is not None and old.values is not None else dict.fromkeys(FEATURES)
        given = {name: value for name, value in row.items() if name in FEATURES}
        self.keys[key] = Known(time, before | given if given else None, pushed=True)
        return True

    def delta(self, rows: list[Row], tombstones: list[Row]) -> None:
        for row in (*rows, *tombstones):
            key, time = row["doc_id"], row[TIMESTAMP]
            old = self.keys.get(key)
            if old is not None and time < old.time:
                continue
            if row in tombstones:
                self.keys.pop(key, None)
            else:
                self.keys[key] = Known(time, {name: row.get(name) for name in FEATURES}, pushed=False)

    def rebase(self, rows: list[Row]) -> None:
        old, self.keys = self.keys, {}
        self.delta(rows, [])
        for key, known in old.items():
            mine = self.keys.get(key)
            if known.pushed and (known.time > mine.time if mine else known.values is not None):
                self.keys[key] = known


class Pushes(RuleBasedStateMachine):
    """A store that follows a root and takes pushes."""

    @initialize(rows=KEY_TIMES)
    def start(self, rows: dict[int, int]) -> None:
        self.directory = Path(tempfile.mkdtemp())
        self.root = ExportRoot(self.directory / "root")
        self.model = Model()
        self.pinned = False
        self.snapshots: dict[str, list[Row]] = {}
        self.log: list[Callable[[], None]] = []
        self.publish(rows, 0)
        stores.load(self.directory / "store", self.root)
        self.log[0]()
        self.writer = StoreWriter(self.directory / "store")
        self.reader = FeatureStore.open(self.directory / "store")

    def publish(self, times: dict[int, int], value: int) -> None:
        rows = [
            {"doc_id": key, "a": value, "text": f"{value}", TIMESTAMP: at(minutes)} for key, minutes in times.items()
        ]
        manifest = stores.publish_snapshot(self.root, VIEW, rows)
        self.snapshots[manifest.snapshot_id] = rows
        self.log.append(partial(self.model.rebase, rows))

    def pushed(self, *orders: tuple[list[Row], list[int]]) -> list[Pushed]:
        """Push rows and deletions (of keys, at the newest time), each order a push of its own; all in one group."""
        version = self.writer.version().view("doc")
        pushes = []
        for rows, deleted in orders:
            batches = [pushed_rows(version, columns([row]), now=NOW) for row in rows]
            if deleted:
                batches.append(deleted_rows(version, {"doc_id": deleted}, now=at(30)))
            pushes.append(Push(batches))
        return push(self.writer, "doc", pushes)

    @rule(
        orders=st.lists(
            st.lists(
                st.tuples(st.sampled_from(KEYS), MINUTES, st.fixed_dictionaries({}, optional=VALUES).filter(bool)),
                max_size=4,
            ),
            min_size=1,
            max_size=4,
        )
    )
    def push_rows(self, orders: list[list[tuple[int, int, Row]]]) -> None:
        rows = [[{"doc_id": key, TIMESTAMP: at(time), **given} for key, time, given in order] for order in orders]
        answers = self.pushed(*((order, []) for order in rows))
        for order, answer in zip(rows, answers, strict=True):
            taken = [self.model.push(row) for row in order]
            assert answer.applied.rows == len(order)
            assert answer.applied.superseded >= taken.count(False)
            assert answer.version == self.writer.version().id

    @rule(times=KEY_TIMES)
    def delete(self, times: dict[int, int]) -> None:
        rows = [{"doc_id": key, TIMESTAMP: at(minutes)} for key, minutes in times.items()]
        version = self.writer.version().view("doc")
        push(self.writer, "doc", [Push([deleted_rows(version, columns(rows), now=NOW)])])
        for row in rows:
            self.model.push(row)

    @precondition(lambda self: not self.pinned)
    @rule(changed=KEY_TIMES, dead=KEY_TIMES, value=st.integers(100, 200))
    def apply_delta(self, changed: dict[int, int], dead: dict[int, int], value: int) -> None:
        rows = [{"doc_id": key, "a": value, TIMESTAMP: at(minutes)} for key, minutes in changed.items()]
        gone = [{"doc_id": key, TIMESTAMP: at(minutes)} for key, minutes in dead.items() if key not in changed]
        stores.publish_delta(self.root, VIEW, rows, gone)
        catch_up(self.writer, self.root, "doc", stores.Silence())
        self.log.append(partial(self.model.delta, rows, gone))
        self.log[-1]()

    @precondition(lambda self: not self.pinned)
    @rule(times=KEY_TIMES, value=st.integers(200, 300))
    def load_snapshot(self, times: dict[int, int], value: int) -> None:
        self.publish(times, value)
        catch_up(self.writer, self.root, "doc", stores.Silence())
        self.log[-1]()

    @precondition(lambda self: not self.pinned and self.kept())
    @rule()
    def go_back(self) -> None:
        generation = self.kept()[0]
        roll_back(self.writer, "doc", generation)
        self.model.rebase(self.snapshots[generation])
        self.pinned = True

    @precondition(lambda self: self.pinned)
    @rule(times=KEY_TIMES, value=st.integers(300, 400))
    def go_on(self, times: dict[int, int], value: int) -> None:
        self.publish(times, value)
        follow_again(self.writer, "doc")
        record = self.writer.record("doc")
        assert record
        for entry in self.log[record.applied_seq :]:
            entry()
        catch_up(self.writer, self.root, "doc", stores.Silence())
        self.pinned = False

    def kept(self) -> list[str]:
        record = self.writer.record("doc")
        return [kept.id for kept in record.kept if kept.id in self.snapshots] if record else []

    @rule()
    def fold(self) -> None:
        fold(self.writer, "doc")

    @rule()
    def merge(self) -> None:
        merge_overlays(self.writer, "doc")

    @rule()
    def restart(self) -> None:
        self.writer.close()
        self.writer = StoreWriter(self.directory / "store")

    @invariant()
    def serves_the_model(self) -> None:
        result = self.reader.lookup(["doc:*"], {"doc_id": KEYS}, stale="serve")
        found = result.to_pydict()
        known = [self.model.keys.get(key) for key in KEYS]
        for name in FEATURES:
            expected = [row.values[name] if row and row.values else None for row in known]
            assert found[f"doc:{name}"] == expected, name
        times = [row.time.replace(tzinfo=None) if row and row.values is not None else None for row in known]
        assert result.views["doc"].event_timestamps.tolist() == times

    @invariant()
    def stays_small_and_whole(self) -> None:
        record = self.writer.record("doc")
        assert record
        assert len(record.overlays) <= MAX_OVERLAYS
        assert sum(segment.pushed for segment in (record.base, *record.overlays)) >= sum(
            known.pushed for known in self.model.keys.values()
        )

    def teardown(self) -> None:
        if hasattr(self, "writer"):
            self.writer.close()
            assert not [checked for checked in verify_store(self.directory / "store") if checked.problem]
            shutil.rmtree(self.directory)


Pushes.TestCase.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestPushes = Pushes.TestCase


# --- what has a test of its own --------------------------------------------------------------------------------


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[StoreWriter]:
    root = ExportRoot(tmp_path / "root")
    stores.publish_snapshot(root, VIEW, [{"doc_id": key, "a": key} for key in KEYS])
    stores.load(tmp_path / "store", root)
    with StoreWriter(tmp_path / "store") as writer:
        yield writer


def a_of(writer: StoreWriter, *keys: int) -> list[int | None]:
    found = FeatureStore.open(writer.store).lookup(["doc:a"], {"doc_id": list(keys)}, stale="serve")
    return found.to_pydict()["doc:a"]


def test_an_id_is_known_again_by_the_next_writer(writer: StoreWriter) -> None:
    first = push_rows(writer, "doc", {"doc_id": [1], "a": [5]}, request_id="x")
    writer.close()
    with StoreWriter(writer.store) as another:
        push_rows(another, "doc", {"doc_id": [1], "a": [6]})
        again = push_rows(another, "doc", {"doc_id": [1], "a": [5]}, request_id="x")
        assert again.applied == first.applied == Applied(rows=1, superseded=0)
        assert a_of(another, 1) == [6]


def test_the_same_id_twice_in_a_group_counts_once(writer: StoreWriter) -> None:
    version = writer.version().view("doc")
    orders = [Push([pushed_rows(version, {"doc_id": [1], "a": [value]}, now=at(1))], "x") for value in (5, 6)]
    answers = push(writer, "doc", orders)
    assert answers[0] == answers[1]
    assert a_of(writer, 1) == [5]


def test_old_ids_are_forgotten(writer: StoreWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_log, "MOST_REMEMBERED", 10)
    for number in range(30):
        push_rows(writer, "doc", {"doc_id": [1], "a": [number]}, request_id=f"{number}")
    known = [number for number in range(30) if writer.requests.applied("doc", f"{number}")]
    assert known[-10:] == list(range(20, 30))
    assert len(known) <= 12


def test_a_push_that_fails_by_what_nobody_foresaw_fails_alone(writer: StoreWriter) -> None:
    """As one would whose rows a worker did not check: its vector is longer than the view's."""
    version = writer.version().view("doc")
    rows = [pushed_rows(version, {"doc_id": [key], "a": [-1], "vector": [[1, 2]]}, now=at(1)) for key in KEYS]
    column = rows[3].schema.get_field_index("vector")
    rows[3] = rows[3].set_column(column, "vector", pa.array([[1, 2, 3]], pa.list_(pa.float32())))

    async def submit_all() -> list[Pushed | BaseException]:
        queue = PushQueue(writer, lambda view: None)
        return await asyncio.gather(*(queue.submit("doc", Push([batch])) for batch in rows), return_exceptions=True)

    answers = asyncio.run(submit_all())
    failed = [number for number, answer in enumerate(answers) if isinstance(answer, BaseException)]
    assert failed == [3]
    assert "is no float32[2]" in str(answers[3])
    assert a_of(writer, *KEYS) == [-1 if key != 3 else 3 for key in KEYS]


def test_rows_of_a_schema_that_is_gone_are_refused(writer: StoreWriter) -> None:
    rows = pushed_rows(writer.version().view("doc"), {"doc_id": [1], "text": ["x"]}, now=NOW)
    without = VIEW.model_copy(update={"features": tuple(one for one in VIEW.features if one.name != "text")})
    define_view(writer, without)
    before = writer.version().id
    with pytest.raises(PushInvalid, match="no feature 'text' any more"):
        push(writer, "doc", [Push([rows])])
    assert writer.version().id == before


def test_a_view_that_no_root_publishes(writer: StoreWriter) -> None:
    view = stores.schema("own", key="string", a="int32")
    define_view(writer, view)
    define_view(writer, view)
    push_rows(writer, "own", {"own_id": ["x"], "a": [1]})
    wider = stores.schema("own", key="string", a="int64", b="string")
    define_view(writer, wider)
    push_rows(writer, "own", {"own_id": ["y"], "b": ["z"]})
    assert fold(writer, "own")
    reader = FeatureStore.open(writer.store)
    assert reader.lookup(["own:*"], {"own_id": ["x", "y"]}).to_pydict() == {"own:a": [1, None], "own:b": [None, "z"]}
    with pytest.raises(SchemaChangeRefused):
        define_view(writer, stores.schema("own", key="string", a="string"))
    drop_view(writer, "own")
    assert not (writer.store / "generations" / "own").exists()
    with pytest.raises(UnknownFeature):
        reader.lookup(["own:a"], {"own_id": ["x"]})
    with pytest.raises(UnknownFeature):
        push_rows(writer, "own", {"own_id": ["x"], "a": [1]})


def test_a_root_takes_over_a_view_that_was_defined_here(tmp_path: Path) -> None:
    root = ExportRoot(tmp_path / "root")
    with StoreWriter(tmp_path / "store") as writer:
        define_view(writer, VIEW)
        push_rows(writer, "doc", {"doc_id": [1, 2], "a": [10, 20], "event_timestamp": [at(-5), at(5)]})
        stores.publish_snapshot(root, VIEW, [{"doc_id": key, "a": key} for key in KEYS])
        catch_up(writer, root, "doc", stores.Silence())
        assert a_of(writer, 1, 2, 3) == [1, 20, 3]
