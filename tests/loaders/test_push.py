"""Pushed rows: after any pushes, publications, folds and rollbacks, the store serves what a plain model predicts."""

import asyncio
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shoal import FeatureStore
from shoal.engine.base.errors import (
    IdempotencyKeyReused,
    PushInvalid,
    SchemaChangeRefused,
    UnknownFeature,
)
from shoal.engine.base.removal_memory import REMOVALS_KEPT
from shoal.engine.push.pushed_rows import deleted_rows, pushed_rows
from shoal.engine.root.export_root import ExportRoot
from shoal.loaders.apply import entries, retention
from shoal.loaders.apply.compaction import MAX_OVERLAYS, fold, merge_overlays
from shoal.loaders.apply.definition import define_view, drop_view
from shoal.loaders.apply.entries import follow_again, roll_back
from shoal.loaders.backup.verify import verify_store
from shoal.loaders.commit import request_log
from shoal.loaders.commit.request_log import PushOutcome
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.follow.load import catch_up
from shoal.loaders.push.push import Push, Pushed, push, push_rows
from shoal.loaders.push.push_queue import PushQueue
from tests import stores
from tests.stores import TIMESTAMP, Row

NOW = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=1)
"""A recent time, because removed keys are remembered only for a limited time."""

VIEW = stores.schema("doc", key="int64", a="int64", text="string", vector="float32[2]", tags="list<string>")
KEYS = list(range(8))
OTHER_KEY = 99
FEATURES = ["a", "text", "vector", "tags"]
VALUES = {
    "a": st.none() | st.integers(-5, 5),
    "text": st.none() | st.sampled_from(["", "x", "long " * 20]),
    "vector": st.none() | st.lists(st.integers(0, 3).map(float), min_size=2, max_size=2),
    "tags": st.none() | st.lists(st.sampled_from(["p", "q"]), max_size=3),
}
MINUTES = st.integers(-8, 8)
KEY_TIMES = st.dictionaries(st.sampled_from(KEYS), MINUTES, min_size=1, max_size=5)


Group = list[list[tuple[int, int, Row | None]]]
"""A list of pushes. Each push is a list of rows: a key, minutes, and values, or None for a deletion."""


def groups(keys: list[int], minutes: st.SearchStrategy[int]) -> st.SearchStrategy[Group]:
    values = st.none() | st.fixed_dictionaries({}, optional=VALUES).filter(bool)
    rows = st.lists(st.tuples(st.sampled_from(keys), minutes, values), max_size=6)
    return st.lists(rows, min_size=1, max_size=4)


def at(minutes: int) -> datetime:
    return NOW + timedelta(minutes=minutes)


def pushed(writer: StoreWriter, *orders: list[Row]) -> list[Pushed]:
    """Push each list of rows as a push of its own, all in one group. Rows without features are deletions."""
    version = writer.version().view("doc")
    pushes = []
    for rows in orders:
        of = [pushed_rows if set(FEATURES) & set(row) else deleted_rows for row in rows]
        pushes.append(Push([make(version, columns([row]), now=NOW) for make, row in zip(of, rows, strict=True)]))
    answers = push(writer, "doc", pushes)
    return [answer for answer in answers if isinstance(answer, Pushed)]


def columns(rows: list[Row]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}


@dataclass(frozen=True)
class Known:
    """The model's knowledge of a key. `values` is None once the key is removed."""

    time: datetime
    values: Row | None
    pushed: bool


class Model:
    """The rules for pushes and entries, applied to one key at a time."""

    def __init__(self) -> None:
        self.keys: dict[int, Known] = {}

    def push(self, rows: list[Row]) -> int:
        """Apply the rows of one push in the order of their event times, and return the number of superseded rows."""
        superseded = 0
        for row in sorted(rows, key=lambda row: row[TIMESTAMP]):
            key = row["doc_id"]
            time = row[TIMESTAMP]
            old = self.keys.get(key)
            if old is not None and time < old.time:
                superseded += 1
                continue
            before = old.values if old is not None and old.values is not None else dict.fromkeys(FEATURES)
            given = {name: value for name, value in row.items() if name in FEATURES}
            self.keys[key] = Known(time, before | given if given else None, pushed=True)
        return superseded

    def delta(self, rows: list[Row], tombstones: list[Row]) -> None:
        for row in (*rows, *tombstones):
            key = row["doc_id"]
            time = row[TIMESTAMP]
            old = self.keys.get(key)
            is_removed_by_log = old is not None and old.values is None and not old.pushed
            if old is not None and time < old.time and not is_removed_by_log:
                continue
            values = None if row in tombstones else {name: row.get(name) for name in FEATURES}
            self.keys[key] = Known(time, values, pushed=False)

    def rebase(self, rows: list[Row], *, goes_back: bool = False) -> None:
        old = self.keys
        self.keys = {}
        self.delta(rows, [])
        for key, known in old.items():
            mine = self.keys.get(key)
            if known.pushed and (mine is None or known.time > mine.time):
                self.keys[key] = known
            elif not known.pushed and mine is None and not goes_back:
                self.keys[key] = Known(known.time, None, pushed=False)


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
        # Keys that the log removes are remembered from the first push on.
        push_rows(self.writer, "doc", {"doc_id": [OTHER_KEY], "a": [1]})
        self.reader = FeatureStore.open(self.directory / "store")

    def publish(self, times: dict[int, int], value: int) -> None:
        rows = [
            {"doc_id": key, "a": value, "text": f"{value}", TIMESTAMP: at(minutes)} for key, minutes in times.items()
        ]
        manifest = stores.publish_snapshot(self.root, VIEW, rows)
        self.snapshots[manifest.snapshot_id] = rows
        self.log.append(partial(self.model.rebase, rows))

    @rule(group=groups(KEYS, MINUTES))
    def push_group(self, group: Group) -> None:
        """Push several times in one commit."""
        pushes = [[{"doc_id": key, TIMESTAMP: at(time)} | (given or {}) for key, time, given in rows] for rows in group]
        answers = pushed(self.writer, *pushes)
        for rows, answer in zip(pushes, answers, strict=True):
            assert answer.applied == PushOutcome(len(rows), self.model.push(rows))
            assert answer.version == self.writer.version().id

    @rule(times=KEY_TIMES)
    def delete(self, times: dict[int, int]) -> None:
        rows = [{"doc_id": key, TIMESTAMP: at(minutes)} for key, minutes in times.items()]
        answer = push_rows(self.writer, "doc", deletes=columns(rows))
        assert answer.applied == PushOutcome(len(rows), self.model.push(rows))

    @precondition(lambda self: not self.pinned)
    @rule(changed=KEY_TIMES, dead=KEY_TIMES, value=st.integers(100, 200))
    def apply_delta(self, changed: dict[int, int], dead: dict[int, int], value: int) -> None:
        rows = [{"doc_id": key, "a": value, TIMESTAMP: at(minutes)} for key, minutes in changed.items()]
        gone = [{"doc_id": key, TIMESTAMP: at(minutes)} for key, minutes in dead.items() if key not in changed]
        stores.publish_delta(self.root, VIEW, rows, gone)
        catch_up(self.writer, self.root, "doc", stores.NullObserver())
        self.log.append(partial(self.model.delta, rows, gone))
        self.log[-1]()

    @precondition(lambda self: not self.pinned)
    @rule(times=KEY_TIMES, value=st.integers(200, 300))
    def load_snapshot(self, times: dict[int, int], value: int) -> None:
        self.publish(times, value)
        catch_up(self.writer, self.root, "doc", stores.NullObserver())
        self.log[-1]()

    @precondition(lambda self: not self.pinned and self.kept())
    @rule()
    def go_back(self) -> None:
        generation = self.kept()[0]
        roll_back(self.writer, "doc", generation)
        self.model.rebase(self.snapshots[generation], goes_back=True)
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
        catch_up(self.writer, self.root, "doc", stores.NullObserver())
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
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestPushes = Pushes.TestCase


# --- cases with their own tests --------------------------------------------------------------------------------


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


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(groups([0, 1], st.integers(-2, 2)), min_size=1, max_size=3))
def test_a_group_of_pushes_is_as_its_rows_one_at_a_time(writer: StoreWriter, groups_of: list[Group]) -> None:
    """Few keys and times are used, so that rows collide. Each example has its own keys, each with an existing row."""
    first = writer.version().id * 10
    model = Model()
    rows = [{"doc_id": first + key, TIMESTAMP: at(-1), "a": 1, "text": "old", "tags": ["p"]} for key in (0, 1)]
    pushed(writer, rows)
    model.push(rows)
    for group in groups_of:
        pushes = [
            [{"doc_id": first + key, TIMESTAMP: at(minutes)} | (given or {}) for key, minutes, given in of]
            for of in group
        ]
        for of, answer in zip(pushes, pushed(writer, *pushes), strict=True):
            assert answer.applied == PushOutcome(len(of), model.push(of))
        found = FeatureStore.open(writer.store).lookup(["doc:*"], {"doc_id": list(model.keys)}, stale="serve")
        cells = found.to_pydict()
        for name in FEATURES:
            assert cells[f"doc:{name}"] == [row.values and row.values[name] for row in model.keys.values()], name
        times = [row.time.replace(tzinfo=None) if row.values is not None else None for row in model.keys.values()]
        assert found.views["doc"].event_timestamps.tolist() == times


def test_an_id_is_known_again_by_the_next_writer(writer: StoreWriter) -> None:
    first = push_rows(writer, "doc", {"doc_id": [1], "a": [5]}, request_id="x")
    writer.close()
    with StoreWriter(writer.store) as another:
        push_rows(another, "doc", {"doc_id": [1], "a": [6]})
        again = push_rows(another, "doc", {"doc_id": [1], "a": [5]}, request_id="x")
        assert again.applied == first.applied == PushOutcome(rows=1, superseded=0)
        assert a_of(another, 1) == [6]


def test_the_same_id_twice_in_a_group_counts_once(writer: StoreWriter) -> None:
    version = writer.version().view("doc")
    orders = [Push([pushed_rows(version, {"doc_id": [1], "a": [value]}, now=at(1))], "x") for value in (5, 6)]
    answers = push(writer, "doc", orders)
    assert answers[0] == answers[1]
    assert a_of(writer, 1) == [5]


def test_an_id_with_other_content_is_refused_and_the_rest_of_its_group_applied(writer: StoreWriter) -> None:
    version = writer.version().view("doc")

    def order(key: int, value: int, request_id: str | None, content: bytes) -> Push:
        return Push([pushed_rows(version, {"doc_id": [key], "a": [value]}, now=at(1))], request_id, content)

    group = [order(1, 5, "x", b"five"), order(1, 6, "x", b"six"), order(2, 7, None, b""), order(1, 5, "x", b"five")]
    first, other, without, again = push(writer, "doc", group)
    assert isinstance(first, Pushed)
    assert isinstance(without, Pushed)
    assert isinstance(other, IdempotencyKeyReused)
    assert again == first
    assert a_of(writer, 1, 2) == [5, 7]
    (later,) = push(writer, "doc", [order(1, 6, "x", b"six")])
    assert isinstance(later, IdempotencyKeyReused)
    assert later.http_status == 422
    writer.close()
    with StoreWriter(writer.store) as another:
        (restarted,) = push(another, "doc", [order(1, 6, "x", b"six")])
        assert isinstance(restarted, IdempotencyKeyReused)


def test_an_id_with_other_rows_is_refused_in_process(writer: StoreWriter) -> None:
    rows = {"doc_id": [1], "a": [5], "vector": [[1.0, 2.0]]}
    first = push_rows(writer, "doc", rows, deletes={"doc_id": [2]}, request_id="x")
    assert push_rows(writer, "doc", rows, deletes={"doc_id": [2]}, request_id="x").applied == first.applied
    for other in (rows | {"a": [6]}, rows | {"event_timestamp": [at(0)]}):
        with pytest.raises(IdempotencyKeyReused, match="'x' was used for a push to view 'doc'"):
            push_rows(writer, "doc", other, deletes={"doc_id": [2]}, request_id="x")
    with pytest.raises(IdempotencyKeyReused):
        push_rows(writer, "doc", rows, deletes={"doc_id": [3]}, request_id="x")
    assert a_of(writer, 1, 2, 3) == [5, None, 3]


def test_an_id_that_was_written_without_its_content_is_taken_for_a_repetition(writer: StoreWriter) -> None:
    """Version 0.1.0 stored no content with the id, and reads only values of 24 bytes."""
    version = writer.version().view("doc")
    rows = [pushed_rows(version, {"doc_id": [1], "a": [5]}, now=at(1))]
    first = push(writer, "doc", [Push(rows, "old")])
    assert push(writer, "doc", [Push(rows, "old", b"content")]) == first
    push(writer, "doc", [Push(rows, "new", b"content")])
    with writer._live.env.begin() as transaction:
        entries = {bytes(key): bytes(value) for key, value in transaction.cursor(db=writer._live.requests)}
    assert sorted(key[:1] for key in entries) == [b"i", b"i", b"t", b"t"]
    assert {len(value) for key, value in entries.items() if key.startswith(b"i")} == {24}


def test_old_ids_are_forgotten(writer: StoreWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_log, "MOST_REMEMBERED", 10)
    for number in range(30):
        push_rows(writer, "doc", {"doc_id": [1], "a": [number]}, request_id=f"{number}")
    known = [number for number in range(30) if writer.requests.known("doc", f"{number}")]
    assert known[-10:] == list(range(20, 30))
    assert len(known) <= 12


def test_a_push_that_fails_by_what_nobody_foresaw_fails_alone(writer: StoreWriter) -> None:
    """The vector is longer than the view's, as in a push that no worker checked."""
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
    assert "does not fit its type float32[2]" in str(answers[3])
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
        stores.publish_snapshot(root, VIEW, [{"doc_id": key, "a": key, TIMESTAMP: at(0)} for key in KEYS])
        catch_up(writer, root, "doc", stores.NullObserver())
        assert a_of(writer, 1, 2, 3) == [1, 20, 3]


def removed_by(how: str, writer: StoreWriter, root: ExportRoot) -> None:
    """Remove key 1, which is in the fixture's snapshot, at minute 5 in the given way."""
    others = [{"doc_id": key, "a": key} for key in KEYS if key != 1]
    if how in ("pushed deletion", "pushed deletion, folded"):
        push_rows(writer, "doc", deletes={"doc_id": [1], "event_timestamp": [at(5)]})
    elif how in ("delta", "delta after a push", "delta after a pushed deletion"):
        if how == "delta after a push":
            push_rows(writer, "doc", {"doc_id": [1], "a": [3], "event_timestamp": [at(3)]})
        elif how == "delta after a pushed deletion":
            push_rows(writer, "doc", deletes={"doc_id": [1], "event_timestamp": [at(3)]})
        stores.publish_delta(root, VIEW, [], [{"doc_id": 1, TIMESTAMP: at(5)}])
        catch_up(writer, root, "doc", stores.NullObserver())
    elif how == "snapshot over a push":
        push_rows(writer, "doc", {"doc_id": [1], "a": [3], "event_timestamp": [at(3)]})
        stores.publish_snapshot(root, VIEW, [{"doc_id": 1, "a": 5, TIMESTAMP: at(5)}, *others])
        catch_up(writer, root, "doc", stores.NullObserver())
    if how == "pushed deletion, folded":
        assert fold(writer, "doc")
    stores.publish_snapshot(root, VIEW, others)
    catch_up(writer, root, "doc", stores.NullObserver())


@pytest.mark.parametrize("later", ["at once", "another snapshot", "folds", "another writer"])
@pytest.mark.parametrize(
    "how",
    [
        "pushed deletion",
        "pushed deletion, folded",
        "delta",
        "delta after a push",
        "delta after a pushed deletion",
        "snapshot over a push",
    ],
)
def test_a_late_push_does_not_bring_back_a_key_that_was_removed(writer: StoreWriter, how: str, later: str) -> None:
    root = ExportRoot(writer.store.parent / "root")
    push_rows(writer, "doc", {"doc_id": [OTHER_KEY], "a": [1]})
    removed_by(how, writer, root)
    if later == "another snapshot":
        stores.publish_snapshot(root, VIEW, [{"doc_id": key, "a": key} for key in KEYS if key != 1])
        catch_up(writer, root, "doc", stores.NullObserver())
    elif later == "folds":
        assert fold(writer, "doc")
        assert fold(writer, "doc")
    elif later == "another writer":
        writer.close()
        writer = StoreWriter(writer.store)
    late = push_rows(writer, "doc", {"doc_id": [1], "a": [4], "event_timestamp": [at(4)]})
    assert late.applied == PushOutcome(rows=1, superseded=1)
    assert a_of(writer, 1) == [None]
    newer = push_rows(writer, "doc", {"doc_id": [1], "a": [6], "event_timestamp": [at(6)]})
    assert newer.applied == PushOutcome(rows=1, superseded=0)
    assert a_of(writer, 1) == [6]
    writer.close()


@pytest.mark.parametrize("meanwhile", ["push", "deletion", "fold", "first push"])
def test_what_comes_while_a_snapshot_takes_over(
    writer: StoreWriter, monkeypatch: pytest.MonkeyPatch, meanwhile: str
) -> None:
    """The rows of the old base to keep are decided before the view's lock is taken."""
    root = ExportRoot(writer.store.parent / "root")
    decide = retention.decided_ahead
    stores.publish_snapshot(root, VIEW, [{"doc_id": 1, "a": 1, TIMESTAMP: at(1)}, {"doc_id": 2, "a": 2}])
    catch_up(writer, root, "doc", stores.NullObserver())
    if meanwhile != "first push":
        push_rows(writer, "doc", {"doc_id": [OTHER_KEY, 3], "a": [1, 3], "event_timestamp": [at(0), at(3)]})
        assert fold(writer, "doc")

    def decided_ahead(*given: Any, **how: Any) -> Any:
        decided = decide(*given, **how)
        if meanwhile in ("push", "first push"):
            push_rows(writer, "doc", {"doc_id": [1, 3], "a": [5, 5], "event_timestamp": [at(5), at(5)]})
        elif meanwhile == "deletion":
            push_rows(writer, "doc", deletes={"doc_id": [1, 3], "event_timestamp": [at(5), at(5)]})
        else:
            push_rows(writer, "doc", {"doc_id": [3], "a": [5], "event_timestamp": [at(5)]})
            assert fold(writer, "doc")
        return decided

    monkeypatch.setattr(entries, "decided_ahead", decided_ahead)
    stores.publish_snapshot(root, VIEW, [{"doc_id": 2, "a": 20, TIMESTAMP: at(2)}])
    catch_up(writer, root, "doc", stores.NullObserver())
    expected = {"push": [5, 20, 5], "first push": [5, 20, 5], "deletion": [None, 20, None], "fold": [None, 20, 5]}
    assert a_of(writer, 1, 2, 3) == expected[meanwhile]
    late = push_rows(writer, "doc", {"doc_id": [1, 3], "a": [9, 9], "event_timestamp": [at(0), at(4)]})
    assert late.applied.superseded == 2
    assert a_of(writer, 1, 2, 3) == expected[meanwhile]


def test_removed_keys_are_forgotten_when_they_are_old(writer: StoreWriter) -> None:
    root = ExportRoot(writer.store.parent / "root")
    old = NOW - REMOVALS_KEPT - timedelta(minutes=1)
    push_rows(writer, "doc", deletes={"doc_id": [101, 102], "event_timestamp": [old, NOW]})
    stores.publish_delta(root, VIEW, [], [{"doc_id": 103, TIMESTAMP: old}, {"doc_id": 104, TIMESTAMP: NOW}])
    catch_up(writer, root, "doc", stores.NullObserver())
    assert tombstones(writer) == 4
    assert fold(writer, "doc")
    assert tombstones(writer) == 2
    stores.publish_snapshot(root, VIEW, [])
    catch_up(writer, root, "doc", stores.NullObserver())
    # The snapshot's own rows have the event time stores.NOW, which is old.
    assert tombstones(writer) == 2
    late = {"doc_id": [101, 102, 103, 104], "a": [1] * 4, "event_timestamp": [old - timedelta(minutes=1)] * 4}
    assert push_rows(writer, "doc", late).applied.superseded == 2


def test_a_removed_key_is_remembered_as_long_as_its_rows_would_be_served(tmp_path: Path) -> None:
    root = ExportRoot(tmp_path / "root")
    view = VIEW.model_copy(update={"ttl": timedelta(days=90)})
    stores.publish_snapshot(root, view, [])
    stores.load(tmp_path / "store", root)
    with StoreWriter(tmp_path / "store") as writer:
        times = [NOW - timedelta(days=89), NOW - timedelta(days=91)]
        push_rows(writer, "doc", deletes={"doc_id": [1, 2], "event_timestamp": times})
        stores.publish_snapshot(root, view, [])
        catch_up(writer, root, "doc", stores.NullObserver())
        assert tombstones(writer) == 1


def test_an_old_deletion_stays_while_snapshots_have_an_older_row(writer: StoreWriter) -> None:
    root = ExportRoot(writer.store.parent / "root")
    old = stores.NOW + timedelta(minutes=1)
    assert old < NOW - REMOVALS_KEPT
    for number in range(3):
        if not number:
            push_rows(writer, "doc", deletes={"doc_id": [1], "event_timestamp": [old]})
        assert fold(writer, "doc")
        assert fold(writer, "doc")
        assert a_of(writer, 1, 2) == [None, 2]
        stores.publish_snapshot(root, VIEW, [{"doc_id": key, "a": key} for key in KEYS])
        catch_up(writer, root, "doc", stores.NullObserver())
        assert a_of(writer, 1, 2) == [None, 2]
    stores.publish_snapshot(root, VIEW, [])
    catch_up(writer, root, "doc", stores.NullObserver())
    assert tombstones(writer) == 0


def test_nothing_is_remembered_of_a_view_that_takes_no_pushes(writer: StoreWriter) -> None:
    root = ExportRoot(writer.store.parent / "root")
    stores.publish_snapshot(root, VIEW, [{"doc_id": 1, "a": 1, TIMESTAMP: NOW}])
    stores.publish_snapshot(root, VIEW, [])
    stores.publish_delta(root, VIEW, [], [{"doc_id": 2, TIMESTAMP: NOW}])
    catch_up(writer, root, "doc", stores.NullObserver())
    assert tombstones(writer) == 1
    assert fold(writer, "doc")
    assert tombstones(writer) == 0


def test_a_published_time_far_ahead_keeps_no_push_out_once_its_key_is_gone(writer: StoreWriter) -> None:
    root = ExportRoot(writer.store.parent / "root")
    push_rows(writer, "doc", {"doc_id": [OTHER_KEY], "a": [1]})
    stores.publish_snapshot(root, VIEW, [{"doc_id": 1, "a": 1, TIMESTAMP: NOW + timedelta(days=4000)}])
    stores.publish_snapshot(root, VIEW, [])
    catch_up(writer, root, "doc", stores.NullObserver())
    assert push_rows(writer, "doc", {"doc_id": [1], "a": [2]}).applied.superseded == 0
    assert a_of(writer, 1) == [2]


def test_a_removed_key_keeps_no_published_row_out(writer: StoreWriter) -> None:
    root = ExportRoot(writer.store.parent / "root")
    push_rows(writer, "doc", {"doc_id": [OTHER_KEY], "a": [1]})
    removed_by("delta", writer, root)
    stores.publish_delta(root, VIEW, [{"doc_id": 1, "a": 2, TIMESTAMP: at(2)}])
    catch_up(writer, root, "doc", stores.NullObserver())
    assert a_of(writer, 1) == [2]


def tombstones(writer: StoreWriter) -> int:
    record = writer.record("doc")
    assert record
    return sum(segment.tombstones for segment in (record.base, *record.overlays))
