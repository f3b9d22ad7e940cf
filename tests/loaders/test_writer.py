"""The writer process: it applies new publications at once, maintains the store, and follows orders."""

import asyncio
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb
import pytest

from shoal import FeatureStore
from shoal.engine.base.errors import (
    ForeignDelta,
    GenerationNotKept,
    LookupInvalid,
    NotPublished,
    SchemaChangeRefused,
    StoreNotFound,
)
from shoal.engine.format.catalog import ViewRecord
from shoal.engine.format.schema import FeatureService
from shoal.engine.process.control import WriterClient
from shoal.engine.root.export_root import SERVICES, ExportRoot
from shoal.engine.store.version import StoreVersion
from shoal.loaders import writer as writer_module
from shoal.loaders.backup.verify import verify_store
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.follow.load import AppliedEntry, Observer, catch_up
from shoal.loaders.writer import WriterProcess
from tests import stores
from tests.loaders import writing
from tests.loaders.forgery import publish, snapshot_table
from tests.server.serving import eventually, standing_still

VIEW = stores.schema("doc", key="int64", a="int64")
OTHER = stores.schema("other", key="int64", a="int64")
FOR_EVER = 600.0
"""A poll interval so long that no poll happens: an entry applied in the meantime was noticed without a poll."""


def rows(value: int, count: int = 20) -> list[stores.Row]:
    return [{"doc_id": n, "a": value} for n in range(count)]


@pytest.fixture
def root(tmp_path: Path) -> ExportRoot:
    root = ExportRoot(tmp_path / "root")
    stores.publish_snapshot(root, VIEW, rows(0))
    stores.publish_snapshot(root, OTHER, [{"other_id": 1, "a": 0}])
    return root


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def writer(store: Path, root: ExportRoot, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A writer that has loaded everything published so far."""
    with writing.running(store, root.path, poll_seconds=FOR_EVER, log=tmp_path / "log") as process:
        eventually(lambda: applied(store, "doc") == applied(store, "other") == 1, "both views are loaded")
        yield process


def record(store: Path, view: str = "doc") -> ViewRecord | None:
    try:
        version = FeatureStore.open(store).version()
    except StoreNotFound:
        return None
    return version.views[view].record if view in version.views else None


def applied(store: Path, view: str = "doc") -> int:
    found = record(store, view)
    return found.applied_seq if found else 0


def seen(store: Path, key: int = 1) -> Any:
    return FeatureStore.open(store).lookup(["doc:a"], {"doc_id": key}).to_pydict()["doc:a"][0]


def ask(store: Path, **order: Any) -> dict[str, Any]:
    return asyncio.run(WriterClient(store).reload(order.pop("view", None), **order))


def test_what_is_published_is_noticed_without_a_poll(
    writer: subprocess.Popen[str], store: Path, root: ExportRoot
) -> None:
    for value in range(1, 6):
        stores.publish_delta(root, VIEW, rows(value))
        eventually(lambda value=value: seen(store) == value, f"value {value}")  # type: ignore[misc]
    assert writer.poll() is None


def test_what_is_published_while_the_writer_stands_still_is_noticed_without_a_poll(
    writer: subprocess.Popen[str], store: Path, root: ExportRoot
) -> None:
    """The system reports a new directory, but not the files that were created in it before it was watched."""
    new = stores.schema("new", key="int64", a="int64")
    for value in range(1, 4):
        with standing_still(writer.pid):
            stores.publish_delta(root, VIEW, rows(value))
            if value == 3:
                stores.publish_snapshot(root, new, [{"new_id": 1, "a": 1}])
        eventually(lambda value=value: seen(store) == value, f"value {value}")  # type: ignore[misc]
    eventually(lambda: applied(store, "new") == 1, "a view that is new")


def test_publications_in_quick_succession_are_all_taken_up(
    writer: subprocess.Popen[str], store: Path, root: ExportRoot
) -> None:
    for value in range(1, 41):
        stores.publish_delta(root, VIEW, rows(value, 2), files=1)
        if value % 3 == 0:
            time.sleep(0.01 * (value % 7))
    eventually(lambda: applied(store) == 41, "the last delta")
    assert seen(store) == 40


def test_a_publication_at_the_very_end_of_catching_up_is_taken_up_too(
    store: Path, root: ExportRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    noticed = threading.Event()

    def catch_up_and_dawdle(writer: StoreWriter, root: ExportRoot, view: str, observer: Observer) -> list[AppliedEntry]:
        done = catch_up(writer, root, view, observer)
        if view == "doc" and not noticed.is_set():
            stores.publish_delta(root, VIEW, rows(1))
            noticed.wait(90)
        return done

    async def scenario(writer: StoreWriter) -> None:
        process = WriterProcess(writer, root, FOR_EVER, 0)
        running = asyncio.create_task(process.run())
        while "doc" not in process._catching_up:
            await asyncio.sleep(0.01)
        while applied(store) != 1 or "doc" not in process._news:
            await asyncio.sleep(0.01)
        noticed.set()
        while applied(store) != 2:
            await asyncio.sleep(0.01)
        process._stop.set()
        await running

    monkeypatch.setattr(writer_module, "catch_up", catch_up_and_dawdle)
    with StoreWriter(store) as writer:
        asyncio.run(asyncio.wait_for(scenario(writer), 90))
    assert seen(store) == 1


def test_a_process_that_can_follow_no_more_ends(store: Path, root: ExportRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    with StoreWriter(store) as writer:

        def break_off(root: str, services: object) -> None:
            raise lmdb.DiskError("the disk is gone")

        monkeypatch.setattr(writer, "commit_root", break_off)
        with pytest.raises(lmdb.DiskError):
            asyncio.run(asyncio.wait_for(WriterProcess(writer, root, FOR_EVER, 0).run(), 90))


def test_overlays_are_folded_in_the_background(writer: subprocess.Popen[str], store: Path, root: ExportRoot) -> None:
    stores.publish_delta(root, VIEW, rows(1))

    def folded() -> ViewRecord | None:
        found = record(store)
        return found if found and found.base.last_seq == 2 else None

    assert eventually(folded, "a fold").overlays == ()
    assert seen(store) == 1
    assert [checked for checked in verify_store(store) if checked.problem] == []


def test_a_view_goes_back_and_on_by_order(writer: subprocess.Popen[str], store: Path, root: ExportRoot) -> None:
    first = root.entry("doc", 1)
    stores.publish_snapshot(root, VIEW, rows(2))
    eventually(lambda: seen(store) == 2, "the second snapshot")
    (answer,) = ask(store, view="doc", snapshot=first.snapshot_id)["views"]
    assert (answer["generation"], answer["applied_seq"], answer["pinned"]) == (first.snapshot_id, 1, True)
    assert seen(store) == 0
    stores.publish_delta(root, VIEW, rows(3))
    (stays,) = (view for view in ask(store)["views"] if view["view"] == "doc")
    assert (stays["applied_seq"], stays["pinned"]) == (1, True)
    (goes_on,) = ask(store, view="doc")["views"]
    assert [entry["seq"] for entry in goes_on["applied"]] == [2, 3]
    assert (goes_on["applied_seq"], goes_on["pinned"], seen(store)) == (3, False, 3)


def test_orders_that_cannot_be_followed_are_answered_with_the_error(
    writer: subprocess.Popen[str], store: Path, root: ExportRoot
) -> None:
    with pytest.raises(GenerationNotKept, match="has no generation 'nonsense' on this node"):
        ask(store, view="doc", snapshot="nonsense")
    with pytest.raises(NotPublished, match="has a view 'nowhere'"):
        ask(store, view="nowhere")
    with pytest.raises(LookupInvalid, match="name the view too"):
        ask(store, snapshot="nonsense")
    stores.publish_snapshot(root, stores.schema("doc", key="int64", a="string"), [{"doc_id": 1, "a": "x"}])
    with pytest.raises(SchemaChangeRefused, match="changed from int64 to string"):
        ask(store, view="doc")
    assert seen(store) == 0
    ask(store, view="doc", accept_schema_change=True)
    assert seen(store) == "x"
    status = asyncio.run(WriterClient(store).status())
    assert (status["pid"], status["root"]) == (writer.pid, str(root.path))


def test_of_all_views_each_is_reloaded_though_one_fails(
    writer: subprocess.Popen[str], store: Path, root: ExportRoot
) -> None:
    with standing_still(writer.pid):
        bad = stores.publish_delta(root, VIEW, rows(1))
        stores.falsify(root, bad, parent="f" * 32)
    stores.publish_delta(root, OTHER, [{"other_id": 1, "a": 1}])
    failed, reloaded = ask(store)["views"]
    assert (failed["view"], failed["error"]["code"]) == ("doc", "ForeignDelta")
    assert (reloaded["view"], reloaded["applied_seq"]) == ("other", 2)
    with pytest.raises(ForeignDelta):
        ask(store, view="doc")


def test_services_that_are_damaged_keep_no_view_from_moving_on(
    writer: subprocess.Popen[str], store: Path, root: ExportRoot
) -> None:
    root.publish_services((FeatureService(name="ranking", features=("doc:a",)),))
    eventually(lambda: "ranking" in FeatureStore.open(store).version().services, "the feature services")
    (root.path / SERVICES).write_bytes(b"{}")
    stores.publish_delta(root, VIEW, rows(1))
    eventually(lambda: seen(store) == 1, "the delta")
    assert "ranking" in FeatureStore.open(store).version().services


def test_a_trouble_of_one_view_holds_up_no_other(writer: subprocess.Popen[str], store: Path, root: ExportRoot) -> None:
    manifest = stores.publish_delta(root, OTHER, [{"other_id": 1, "a": 1}])
    eventually(lambda: applied(store, "other") == 2, "the delta")
    with standing_still(writer.pid):
        bad = stores.publish_delta(root, OTHER, [{"other_id": 1, "a": 2}])
        stores.falsify(root, bad, parent="f" * 32)
    stores.publish_delta(root, VIEW, rows(1))
    eventually(lambda: seen(store) == 1, "the delta of the other view")
    ask(store, view="doc")
    trouble = eventually(lambda: FeatureStore.open(store).version().troubles.get("other"), "the trouble")
    assert trouble.code == "ForeignDelta"
    stores.falsify(root, bad, parent=manifest.id)
    eventually(lambda: applied(store, "other") == 3, "the delta, mended")


def test_a_root_that_is_made_later_is_found(store: Path, tmp_path: Path) -> None:
    root = ExportRoot(tmp_path / "later")
    with writing.running(store, root.path, poll_seconds=FOR_EVER) as process:
        eventually(lambda: (store / "run" / "writer.sock").exists(), "the writer")
        stores.publish_snapshot(root, VIEW, rows(7))
        process.send_signal(signal.SIGHUP)
        eventually(lambda: applied(store) == 1, "the snapshot")


@pytest.mark.parametrize("leaves", ["nothing", "an empty directory"])
def test_a_root_that_is_gone_is_named_and_takes_nothing_along(store: Path, root: ExportRoot, leaves: str) -> None:
    root.publish_services((FeatureService(name="ranking", features=("doc:a",)),))
    away = root.path.with_name("away")

    def now() -> StoreVersion:
        return FeatureStore.open(store).version()

    with writing.running(store, root.path, poll_seconds=0.1):
        eventually(lambda: applied(store, "doc") == applied(store, "other") == 1, "both views are loaded")
        root.path.rename(away)
        if leaves == "an empty directory":
            root.path.mkdir()
        eventually(lambda: set(now().troubles) == {"doc", "other"}, "the trouble")
        assert str(root) in now().troubles["doc"].message
        assert "ranking" in now().services
        assert seen(store) == 0
        if leaves == "an empty directory":
            root.path.rmdir()
        away.rename(root.path)
        stores.publish_delta(root, VIEW, rows(1))
        eventually(lambda: seen(store) == 1 and not now().troubles, "the delta, and the end of the trouble")


def test_a_writer_leaves_half_of_the_cores_to_lookups(writer: subprocess.Popen[str]) -> None:
    cores = len(os.sched_getaffinity(0))
    assert len(os.sched_getaffinity(writer.pid)) == (cores + 1) // 2


def test_a_writer_ends_when_it_is_told_to_though_it_is_loading(store: Path, root: ExportRoot) -> None:
    with writing.running(store, root.path, poll_seconds=0.1) as process:
        eventually(lambda: applied(store) == 1, "the first snapshot")
        publish(root, VIEW, snapshot_table(VIEW, rows(1, 50_000)), row_group_size=100)
        eventually(lambda: list((store / "generations" / "doc").glob(".building-*")), "a build that has begun")
        process.terminate()
        assert process.wait(30) == 0
    stores.load(store, root)
    assert seen(store, 49_999) == 1


def test_a_second_writer_is_refused(
    writer: subprocess.Popen[str], store: Path, root: ExportRoot, tmp_path: Path
) -> None:
    with writing.running(store, root.path, poll_seconds=FOR_EVER, log=tmp_path / "second") as second:
        assert second.wait(30) == 1
    assert f"is being written by process {writer.pid}" in (tmp_path / "second").read_text()
    stores.publish_delta(root, VIEW, rows(1))
    eventually(lambda: seen(store) == 1, "the delta, by the first writer")
