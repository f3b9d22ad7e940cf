"""A writer is killed at any step of its work: readers see the old or the new data, complete. The next writer finishes
the work, and leaves nothing over."""

import asyncio
import gc
import signal
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import lmdb
import pytest

from shoal import FeatureStore
from shoal.engine.base.errors import UnknownFeature, ViewDamaged, WriterUnavailable
from shoal.engine.format import seal
from shoal.engine.format.paths import live_path
from shoal.engine.format.progress import begun_path
from shoal.engine.kernels.gathering import Status
from shoal.engine.lookup.columns import lookup
from shoal.engine.process.control import WriterClient
from shoal.engine.push.pushed_rows import pushed_rows
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.store.environment import open_live
from shoal.engine.store.version import StoreVersion
from shoal.loaders.apply.definition import define_view
from shoal.loaders.apply.entries import roll_back
from shoal.loaders.backup.verify import verify_store
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.follow.load import load
from shoal.loaders.push.push import push_rows
from tests import stores
from tests.damage import BIT, harm
from tests.failpoints.processes import running, write, write_and_scrub, write_without_patience
from tests.loaders.forgery import publish, snapshot_table
from tests.server.serving import PATIENCE_SECONDS, eventually

VIEW = stores.schema("doc", key="int64", a="int64", text="string")
OWN = stores.schema("own", key="int64", a="int64")
COUNT = 60
KEYS = list(range(COUNT + 1))

Content = dict[int, tuple[int | None, str | None]]
"""The expected row of each key in a view, computed independently from what was published and pushed."""


def rows(value: int, keys: Sequence[int] = KEYS[:COUNT]) -> list[stores.Row]:
    return [{"doc_id": key, "a": value, "text": f"{value}/{key}"} for key in keys]


def content(value: int, keys: Sequence[int] = KEYS[:COUNT]) -> Content:
    return {key: (value, f"{value}/{key}") for key in keys}


def shown(store: FeatureStore, view: str = "doc") -> Content | None:
    """Return all rows of a view in one version, or None if there is no such view or it cannot be read."""
    try:
        return shown_in(store.version(), view)
    except (UnknownFeature, ViewDamaged):
        return None


def shown_in(version: StoreVersion, view: str = "doc") -> Content:
    """Return all rows of a view in a version."""
    result = lookup(version, [f"{view}:*"], {f"{view}_id": KEYS}, now=time.time_ns() // 1000)
    columns = [column.to_arrow().to_pylist() for column in result.columns]
    a, text = columns if len(columns) == 2 else (columns[0], [None] * len(KEYS))
    found = result.views[view].status == Status.PRESENT
    return {key: (a[key], text[key]) for key in KEYS if found[key]}


class Case:
    """A store and its root. A scenario's `prepare` brings them to the state in which the writer that dies starts."""

    def __init__(self, directory: Path) -> None:
        self.store = directory / "store"
        self.root = ExportRoot(directory / "root")

        self.held: StoreVersion | None = None

    def snapshot(self, value: int) -> None:
        publish(self.root, VIEW, snapshot_table(VIEW, rows(value)), row_group_size=10)

    def load(self) -> None:
        with StoreWriter(self.store) as writer:
            load(writer, self.root, stores.NullObserver())

    def base_of(self, seq: int) -> str:
        """Return the id of the base that was loaded from the snapshot `seq`: the current base or a kept one."""
        record = FeatureStore.open(self.store).version().view("doc").record
        return next(base.id for base in (record.base, *record.kept) if base.last_seq == seq)

    def ask(self, order: "Order") -> Any:
        """Return the writer's answer to an order, once there is a writer."""

        def attempt() -> Any:
            with suppress(WriterUnavailable):
                return [asyncio.run(order(self, WriterClient(self.store)))]
            return None

        return eventually(attempt, "an answer of the writer")[0]


Order = Callable[[Case, WriterClient], Coroutine[Any, Any, Any]]


@dataclass(frozen=True)
class Scenario:
    """What a writer does, by itself or on an `order`, and the steps at which it is killed."""

    prepare: Callable[[Case], None]
    before: Content | None
    after: Content | None
    points: str
    between: tuple[Content | None, ...] = ()
    order: Order | None = None
    view: str = "doc"
    harm: str | None = None
    main: Callable[[Path, Path], None] = write


def three_snapshots(case: Case) -> None:
    """Load so many snapshots that the next base causes the removal of the oldest."""
    for value in (1, 2, 3):
        case.snapshot(value)
        case.load()


def first_snapshot(case: Case) -> None:
    stores.publish_snapshot(case.root, OWN, [{"own_id": 1, "a": 1}])
    case.load()
    case.snapshot(1)


def newer_snapshot(case: Case) -> None:
    three_snapshots(case)
    case.snapshot(4)


def small_deltas(case: Case) -> None:
    case.snapshot(1)
    stores.publish_delta(case.root, VIEW, rows(2, [1, 2]))
    case.load()
    stores.publish_delta(case.root, VIEW, rows(3, [2, 3]), [{"doc_id": 4}])


def large_delta(case: Case) -> None:
    three_snapshots(case)
    stores.publish_delta(case.root, VIEW, rows(4, KEYS[:30]), [{"doc_id": 59}])


def own_view(case: Case) -> None:
    case.snapshot(1)
    case.load()
    with StoreWriter(case.store) as writer:
        define_view(writer, OWN)
        push_rows(writer, "own", {"own_id": [1], "a": [7]})


def one_snapshot(case: Case) -> None:
    case.snapshot(1)
    case.load()


def never_sealed(case: Case) -> None:
    """Leave the store as an earlier release did, without a record of the store's progress."""
    one_snapshot(case)
    gc.collect()
    with lmdb.open(str(live_path(case.store)), max_dbs=3) as env, env.begin(write=True) as transaction:
        transaction.delete(seal.KEY, db=env.open_db(b"catalog", transaction))
    begun_path(case.store).unlink()


def one_delta(case: Case) -> None:
    case.snapshot(1)
    stores.publish_delta(case.root, VIEW, rows(2, [1, 2]))
    case.load()


def went_back(case: Case) -> None:
    three_snapshots(case)
    with StoreWriter(case.store) as writer:
        roll_back(writer, "doc", case.base_of(2))


def held_pages(case: Case) -> None:
    """Hold more pages than are in use."""
    one_snapshot(case)
    with StoreWriter(case.store) as writer:
        case.held = FeatureStore.open(case.store).version()
        for value in range(20):
            push_rows(writer, "doc", {"doc_id": [2], "a": [value], "text": [f"{value}/2"]})


async def push(case: Case, writer: WriterClient, value: int = 9, request_id: str | None = "once") -> Any:
    columns = {"doc_id": [1], "a": [value], "text": [f"{value}/1"], "event_timestamp": [stores.NOW]}
    view = FeatureStore.open(case.store).version().view("doc")
    return await writer.push("doc", [pushed_rows(view, columns, now=stores.NOW)], request_id)


async def drop(case: Case, writer: WriterClient) -> None:
    with suppress(UnknownFeature):  # The killed writer may have dropped it.
        await writer.drop_view("own")


HELD = content(1) | content(19, [2])
DELTA = content(1) | content(2, [1, 2])
MERGED = {key: row for key, row in (DELTA | content(3, [2, 3])).items() if key != 4}
FOLDED = {key: row for key, row in (content(3) | content(4, KEYS[:30])).items() if key != 59}
BASE_POINTS = "base.begun base.chunk-written base.chunk-written:3 base.finished base.renamed commit.written commit.done"

SCENARIOS = {
    "start": Scenario(three_snapshots, content(3), content(3), "writer.locked writer.listening"),
    "start on a store of an earlier release": Scenario(
        never_sealed, content(1), content(1), "commit.durable begun.aside writer.listening"
    ),
    "first load": Scenario(first_snapshot, None, content(1), BASE_POINTS),
    "load": Scenario(newer_snapshot, content(3), content(4), BASE_POINTS + " commit.base-removed"),
    "delta and merge": Scenario(
        small_deltas, DELTA, MERGED, "commit.written commit.done commit.written:2 commit.done:2"
    ),
    "fold": Scenario(
        large_delta,
        content(3),
        FOLDED,
        "base.begun base.chunk-written base.chunk-written:2 base.finished base.renamed commit.written:2 commit.done:2 "
        "commit.base-removed",
    ),
    "roll back": Scenario(
        three_snapshots,
        content(3),
        content(2),
        "commit.written commit.done",
        order=lambda case, writer: writer.reload("doc", snapshot=case.base_of(2)),
    ),
    "follow again": Scenario(
        went_back,
        content(2),
        content(3),
        "commit.written commit.done commit.written:2 commit.done:2",
        order=lambda case, writer: writer.reload("doc"),
    ),
    "push": Scenario(
        one_snapshot,
        content(1),
        content(1) | content(9, [1]),
        "push.laid commit.written commit.durable commit.done push.answering",
        order=push,
    ),
    "replacement of live": Scenario(
        held_pages,
        HELD,
        HELD | content(9, [1]),
        "commit.done live.copied live.named live.replaced",
        order=push,
        main=write_without_patience,
    ),
    "define": Scenario(
        one_snapshot,
        None,
        {},
        "base.begun base.finished base.renamed commit.written commit.done",
        order=lambda case, writer: writer.define_view(OWN),
        view="own",
    ),
    "drop": Scenario(
        own_view, {1: (7, None)}, None, "commit.written commit.done commit.base-removed", order=drop, view="own"
    ),
    "repair of a base": Scenario(one_delta, DELTA, DELTA, "repair.base-removed " + BASE_POINTS, harm="base missing"),
    "scrub": Scenario(
        one_delta,
        DELTA,
        DELTA,
        "scrub.damage-noted repair.base-removed base.renamed commit.written commit.done",
        harm=BIT,
        main=write_and_scrub,
        between=(None,),
    ),
    "repair of an overlay": Scenario(
        one_delta,
        None,
        DELTA,
        "commit.written commit.done commit.written:2 commit.done:2",
        between=(content(1),),
        harm="overlay missing",
    ),
}
CASES = [(name, point) for name, scenario in SCENARIOS.items() for point in scenario.points.split()]


def left_over(store: Path) -> set[str]:
    """Return what exists in a store without being named, and what is named but missing."""
    version = FeatureStore.open(store).version()
    views = list(version.views.values())
    named = {f"{view.name}/{base.id}" for view in views for base in (view.record.base, *view.record.kept)}
    found = {f"{path.parent.name}/{path.name}" for path in (store / "generations").glob("*/*")}
    found |= {path.name for path in (store / "generations").iterdir() if not any(path.iterdir())}
    overlays = {overlay.id for view in views for overlay in view.record.overlays}
    live = open_live(store)
    with live.env.begin() as transaction:
        chunks = {bytes(key).decode().partition("/")[0] for key, _ in transaction.cursor(db=live.segments)}
    aside = {path.name for path in (store / "live").glob(".*")}
    return (found ^ named) | (chunks ^ overlays) | aside


@pytest.mark.parametrize(("name", "point"), CASES, ids=[f"{name} - {point}" for name, point in CASES])
def test_a_writer_that_is_killed_at_a_step(name: str, point: str, tmp_path: Path) -> None:
    scenario = SCENARIOS[name]
    case = Case(tmp_path)
    log = tmp_path / "log"
    scenario.prepare(case)
    reader = FeatureStore.open(case.store)
    if scenario.harm:
        shown(reader)
        harm(case.store, scenario.view, scenario.harm)
    if scenario.harm == "overlay missing":
        # This damage gives pages back, which a failing disk does not do. A reader that has the pages open would see
        # them used again.
        reader = FeatureStore.open(case.store)
    states = [scenario.before, *scenario.between, scenario.after]
    assert shown(reader, scenario.view) == scenario.before

    def check() -> Content | None:
        """Return what `reader` sees. Assert that it is one of the states, and not an earlier one than before."""
        seen = shown(reader, scenario.view)
        assert seen in states, seen
        del states[: states.index(seen)]
        return seen

    def has_ended(writer: ForkServerProcess) -> bool:
        if scenario.order is not None:
            # The order is repeated, because at first the socket may be the killed writer's, where nobody listens.
            with pytest.raises(WriterUnavailable):
                asyncio.run(scenario.order(case, WriterClient(case.store)))
        check()
        return writer.exitcode is not None

    with running(scenario.main, case.store, case.root.path, die_at=point, log=log) as writer:
        eventually(lambda: has_ended(writer), f"the end of the writer at {point}")
        assert writer.exitcode == -signal.SIGKILL, log.read_text()
    check()
    with running(write, case.store, case.root.path, die_at=None, log=log) as writer:
        if scenario.order is not None:
            first = case.ask(scenario.order)
        if scenario.order is push:
            check()
            # Of two rows with equal event times the later one wins, so a second application of the repeated push would
            # show.
            case.ask(partial(push, value=10, request_id=None))
            assert {**case.ask(push), "version": 0} == {**first, "version": 0}
            states = [(scenario.after or {}) | content(10, [1])]
        eventually(lambda: check() == states[-1], "what was to come")
        eventually(lambda: not left_over(case.store), lambda: f"a store without {left_over(case.store)}")
        case.ask(lambda case, writer: writer.status())
        writer.terminate()
        writer.join(PATIENCE_SECONDS)
        assert writer.exitcode == 0, log.read_text()
    assert shown(reader, scenario.view) == states[-1]
    if case.held is not None:
        # The pages of the held version were never used again.
        assert shown_in(case.held) == content(1)
    assert [checked for checked in verify_store(case.store) if checked.problem] == []
    assert "unexpected" not in log.read_text()
