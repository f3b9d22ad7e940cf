"""A writer that is killed at any step of what it does: readers see the old or the new, whole, and the next writer ends
at the new, with nothing left over.
"""

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

from engine import FeatureStore, seal
from engine.begun import begun_path
from engine.control import WriterClient
from engine.environment import live_path, open_live
from engine.errors import UnknownFeature, ViewDamaged, WriterUnavailable
from engine.export_root import ExportRoot
from engine.kernels.gathering import Status
from engine.lookup import lookup
from engine.pushed_rows import pushed_rows
from engine.version import StoreVersion
from loaders.apply import roll_back
from loaders.definition import define_view
from loaders.load import load
from loaders.push import push_rows
from loaders.store_writer import StoreWriter
from loaders.verify import verify_store
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
"""What a view shows of each key that it has: an independent account of what was published and pushed."""


def rows(value: int, keys: Sequence[int] = KEYS[:COUNT]) -> list[stores.Row]:
    return [{"doc_id": key, "a": value, "text": f"{value}/{key}"} for key in keys]


def content(value: int, keys: Sequence[int] = KEYS[:COUNT]) -> Content:
    return {key: (value, f"{value}/{key}") for key in keys}


def shown(store: FeatureStore, view: str = "doc") -> Content | None:
    """All rows of a view, of one version; None if there is no such view, or it cannot be read."""
    try:
        return shown_in(store.version(), view)
    except (UnknownFeature, ViewDamaged):
        return None


def shown_in(version: StoreVersion, view: str = "doc") -> Content:
    """All rows of a view in one version."""
    result = lookup(version, [f"{view}:*"], {f"{view}_id": KEYS}, now=time.time_ns() // 1000)
    columns = [column.to_arrow().to_pylist() for column in result.columns]
    a, text = columns if len(columns) == 2 else (columns[0], [None] * len(KEYS))
    found = result.views[view].status == Status.PRESENT
    return {key: (a[key], text[key]) for key in KEYS if found[key]}


class Case:
    """A store with a root, which `prepare` of a scenario brings to where the writer that is to die starts."""

    def __init__(self, directory: Path) -> None:
        self.store, self.root = directory / "store", ExportRoot(directory / "root")

        self.held: StoreVersion | None = None

    def snapshot(self, value: int) -> None:
        publish(self.root, VIEW, snapshot_table(VIEW, rows(value)), row_group_size=10)

    def load(self) -> None:
        with StoreWriter(self.store) as writer:
            load(writer, self.root, stores.Silence())

    def base_of(self, seq: int) -> str:
        """The id of the view's base, or of a kept one, that was loaded from a snapshot."""
        record = FeatureStore.open(self.store).version().view("doc").record
        return next(base.id for base in (record.base, *record.kept) if base.last_seq == seq)

    def ask(self, order: "Order") -> Any:
        """What the writer answers, once there is one."""

        def attempt() -> Any:
            with suppress(WriterUnavailable):
                return [asyncio.run(order(self, WriterClient(self.store)))]
            return None

        return eventually(attempt, "an answer of the writer")[0]


Order = Callable[[Case, WriterClient], Coroutine[Any, Any, Any]]


@dataclass(frozen=True)
class Scenario:
    """What a writer does, by itself or as it is told by `order`, and the steps at which it is killed over it."""

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
    """So many that the next base has the oldest removed."""
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
    """As a release left it that kept no record of how far the store got."""
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
    """More of them than are in use."""
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
    with suppress(UnknownFeature):  # The one before got so far.
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
    """What lies in a store though nothing names it, and what is named and is not there."""
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
    scenario, case, log = SCENARIOS[name], Case(tmp_path), tmp_path / "log"
    scenario.prepare(case)
    reader = FeatureStore.open(case.store)
    if scenario.harm:
        shown(reader)
        harm(case.store, scenario.view, scenario.harm)
    if scenario.harm == "overlay missing":
        # No disk that fails gives pages back, as this hand does: who has them open would see them used again.
        reader = FeatureStore.open(case.store)
    states = [scenario.before, *scenario.between, scenario.after]
    assert shown(reader, scenario.view) == scenario.before

    def check() -> Content | None:
        """What a reader sees that is there throughout: one of the states, and none that it has left."""
        seen = shown(reader, scenario.view)
        assert seen in states, seen
        del states[: states.index(seen)]
        return seen

    def has_ended(writer: ForkServerProcess) -> bool:
        if scenario.order is not None:
            # Again and again: at first the socket may still be the one before's, on which nobody hears.
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
            # Of equal event times what came later stays: the repetition would show, were it applied once more.
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
        # Its pages were never used again.
        assert shown_in(case.held) == content(1)
    assert [checked for checked in verify_store(case.store) if checked.problem] == []
    assert "unexpected" not in log.read_text()
