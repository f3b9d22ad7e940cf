"""Readers run beside a writer that is killed again and again: no answer is torn, mixed or older than the last one."""

import json
import random
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from shoal import FeatureStore
from shoal.engine.format.paths import generations_path
from shoal.engine.root.export_root import ExportRoot
from shoal.loaders.apply import compaction
from shoal.loaders.apply.compaction import fold
from shoal.loaders.backup.verify import verify_store
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.follow.load import catch_up
from tests import stores
from tests.consistency.reading import Reading
from tests.consistency.rows import FEATURES, KEYS, VIEW, number_of, rows, tombstones
from tests.loaders import writing
from tests.server.serving import eventually

KILLS = 5
READERS = 2
MOST_AHEAD = 40
"""The largest number of entries that a publisher is ahead of the store. A writer with little time must still catch up
at the end."""


class Publisher:
    """A publisher of one number after another, each as a delta of all rows or, now and then, as a snapshot."""

    def __init__(self, root: ExportRoot) -> None:
        self.root = root
        self.number = 0

    def publish(self) -> None:
        self.number += 1
        if self.number % 12 == 1:
            stores.publish_snapshot(self.root, VIEW, rows(self.number))
        else:
            stores.publish_delta(self.root, VIEW, rows(self.number), tombstones(self.number))

    @contextmanager
    def going_on(self, reader: FeatureStore) -> Iterator[None]:
        """Publish during the block, at most MOST_AHEAD entries ahead of what a reader sees."""
        stop = threading.Event()

        def publish() -> None:
            while not stop.wait(0.05):
                if self.number - reader.version().view(VIEW.name).record.applied_seq < MOST_AHEAD:
                    self.publish()

        thread = threading.Thread(target=publish)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


@contextmanager
def reading_processes(store: Path) -> Iterator[list["subprocess.Popen[str]"]]:
    command = [sys.executable, "-m", "tests.consistency.reading", str(store)]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(READERS)
    ]
    try:
        for process in processes:
            assert process.stdout
            assert process.stdout.readline() == "reading\n"
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_readers_see_whole_versions_in_order_though_the_writer_is_killed(tmp_path: Path) -> None:
    root = ExportRoot(tmp_path / "root")
    store = tmp_path / "store"
    log = tmp_path / "log"
    publisher = Publisher(root)
    publisher.publish()
    stores.load(store, root)
    source = random.Random()
    reader = FeatureStore.open(store)
    with reading_processes(store) as readers:
        with publisher.going_on(reader):
            for _ in range(KILLS):
                before = reader.version().id
                with writing.running(store, root.path, poll_seconds=0.2, log=log) as writer:
                    eventually(lambda before=before: reader.version().id > before + 3, "some commits")  # type: ignore[misc]
                    time.sleep(source.uniform(0, 0.2))
                    assert writer.poll() is None, log.read_text()
                    writer.kill()
        with writing.running(store, root.path, poll_seconds=0.2, log=log):
            eventually(lambda: _shown(reader) == publisher.number, "the last number")
            found = [_finish(process) for process in readers]
    for report in found:
        assert report["errors"] == []
        assert report["lookups"] > 50
    together: dict[str, int] = {}
    for report in found:
        for version, number in report["numbers"].items():
            assert together.setdefault(version, number) == number, f"readers disagree on version {version}"
    in_order = [together[version] for version in sorted(together, key=int)]
    assert in_order == sorted(in_order)
    assert len(set(in_order)) > KILLS
    assert [checked for checked in verify_store(store) if checked.problem] == []
    assert "unexpected" not in log.read_text()


def test_threads_beside_a_writer_see_whole_versions_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Generations are removed as soon as nothing names them, and folds and snapshots overtake each other."""
    monkeypatch.setattr(compaction, "FOLD_LEAST_ROWS", 0)
    root = ExportRoot(tmp_path / "root")
    store = tmp_path / "store"
    publisher = Publisher(root)
    publisher.publish()
    with StoreWriter(store, kept_generations=0) as writer:
        catch_up(writer, root, "doc", stores.NullObserver())
        reading = Reading(FeatureStore.open(store))
        folding = threading.Thread(target=_fold_over_and_over, args=(writer, reading))
        threads = [folding, *(threading.Thread(target=reading.run, args=(seed,)) for seed in range(6))]
        for thread in threads:
            thread.start()
        try:
            while publisher.number < 60 and not reading.errors:
                publisher.publish()
                catch_up(writer, root, "doc", stores.NullObserver())
        finally:
            reading.stop.set()
            for thread in threads:
                thread.join()
        assert reading.errors == []
        assert reading.lookups > 50
        assert _shown(reading.store) == 60
        assert [checked for checked in verify_store(store) if checked.problem] == []
        base = writer.version().view("doc").record.base
        assert [path.name for path in generations_path(store, "doc").iterdir()] == [base.id]


def test_a_reader_that_opens_a_generation_as_it_goes_takes_the_next(tmp_path: Path) -> None:
    """Readers come and go, and open every base anew. Each base is removed as soon as the next one exists."""
    root = ExportRoot(tmp_path / "root")
    store = tmp_path / "store"
    stores.publish_snapshot(root, VIEW, rows(1))
    stop = threading.Event()
    errors = list[str]()
    opened = list[int]()
    with StoreWriter(store, kept_generations=0) as writer:
        catch_up(writer, root, "doc", stores.NullObserver())

        def come_and_go() -> None:
            try:
                while not stop.is_set():
                    opened.append(_shown(FeatureStore.open(store)))
            except BaseException:
                errors.append(traceback.format_exc())

        threads = [threading.Thread(target=come_and_go) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            for number in range(2, 30):
                stores.publish_snapshot(root, VIEW, rows(number), files=1)
                catch_up(writer, root, "doc", stores.NullObserver())
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert errors == []
    assert len(set(opened)) > 3


def _fold_over_and_over(writer: StoreWriter, reading: Reading) -> None:
    try:
        while not reading.stop.wait(0.01):
            fold(writer, "doc")
    except BaseException:
        reading.errors.append(traceback.format_exc())


def _shown(store: FeatureStore) -> int:
    keys = list(range(KEYS))
    return number_of(store.lookup(FEATURES, {"doc_id": keys}), keys)


def _finish(process: "subprocess.Popen[str]") -> dict[str, Any]:
    output, _ = process.communicate("")
    report: dict[str, Any] = json.loads(output)
    return report
