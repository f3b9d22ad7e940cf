"""Tables are brought up to date with an export root: only changes are written, whatever fails, and a sync continues
from wherever the last one died."""

import json
import random
import re
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest

from shoal import FeatureStore
from shoal.engine.base.errors import (
    FileDamaged,
    ForeignDelta,
    RowTooLarge,
    TableFailed,
    TableInvalid,
    TableMissing,
    TableTaken,
)
from shoal.engine.base.failpoints import FAILPOINTS
from shoal.engine.format.schema import ViewSchema
from shoal.engine.root.export_root import ExportRoot
from tests import stores
from tests.dynamodb.tables import forget_lease, items, remote, shoal, sync, sync_in_steps
from tests.failpoints.processes import running
from tests.faulty_network import FaultyNetwork
from tests.server.serving import PATIENCE_SECONDS, eventually

LOCAL = stores.schema("here", key="int64", a="int64", text="string")
KEYS = list(range(400))


class Twins:
    """The same entries published twice: for a view on the node, and for a view in a table."""

    def __init__(self, directory: Path, table: str) -> None:
        self.directory = directory
        self.root = ExportRoot(directory / "root")
        self.table = table
        self.there = remote(LOCAL.model_copy(update={"name": "there"}), table)
        self.views: tuple[ViewSchema, ...] = (LOCAL, self.there)

    def snapshot(self, rows: list[stores.Row]) -> None:
        for view in self.views:
            stores.publish_snapshot(self.root, view, rows)

    def delta(self, rows: list[stores.Row], tombstones: list[stores.Row] | None = None) -> None:
        for view in self.views:
            stores.publish_delta(self.root, view, rows, tombstones or [])

    def check(self) -> None:
        """Assert that both views show the same values, event times and statuses."""
        stores.load(self.directory / "store", self.root)
        opened = FeatureStore.open(self.directory / "store")
        keys = {"here_id": KEYS}
        here, there = (opened.lookup([f"{view}:*"], keys, remote_timeout=20.0) for view in ("here", "there"))
        assert there.partial == []
        for one, other in zip(here.columns, there.columns, strict=True):
            assert one.to_pylist() == other.to_pylist()
            assert one.rows.event_time.tolist() == other.rows.event_time.tolist()
            assert one.status.tolist() == other.status.tolist()


@pytest.fixture
def twins(tmp_path: Path, table: str) -> Twins:
    return Twins(tmp_path, table)


def row(key: int, value: int, seconds: float = 0.0) -> stores.Row:
    return {"here_id": key, "a": value, "text": f"{value}" * (key % 5), stores.TIMESTAMP: later(seconds)}


def later(seconds: float) -> Any:
    return stores.NOW + timedelta(seconds=seconds)


def dead(key: int, seconds: float = 0.0) -> stores.Row:
    return {"here_id": key, stores.TIMESTAMP: later(seconds)}


def test_only_what_changed_is_written(twins: Twins) -> None:
    twins.snapshot([row(key, 1) for key in range(300)])
    (first,) = sync(twins.root)
    assert (first.puts, first.deletes, first.unchanged) == (300, 0, 0)
    twins.check()
    twins.delta([row(1, 2, 10), row(350, 2, 10)], [dead(2, 10)])
    # Rows and tombstones that are older than the table's row are not written. A key that vanished may come back with
    # any event time.
    twins.delta([row(1, 3, 5), row(2, 3, -5)], [dead(350, 5), dead(399)])
    second, third = sync(twins.root)
    assert (second.puts, second.deletes, second.superseded) == (2, 1, 0)
    assert (third.puts, third.deletes, third.superseded) == (2, 2, 3)
    twins.check()
    assert sync(twins.root) == []
    # A snapshot replaces all rows, also newer ones, and writes only the rows that differ.
    twins.snapshot([*(row(key, 1) for key in range(290)), row(295, 9, 1)])
    (fourth,) = sync(twins.root)
    assert (fourth.puts, fourth.unchanged, fourth.deletes, fourth.superseded) == (3, 288, 10, 0)
    assert len(items(twins.table)) == 291
    twins.check()


def test_random_entries_leave_in_a_table_what_they_leave_on_a_node(twins: Twins) -> None:
    source = random.Random(5)
    twins.snapshot([row(key, 0) for key in source.sample(KEYS, 200)])
    for step in range(1, 9):
        keys = source.sample(KEYS, 40)
        times = [source.uniform(-20, 20 * step) for _ in keys]
        if step == 5:
            twins.snapshot([row(key, step, time) for key, time in zip(keys, times, strict=True)])
        else:
            changes = [row(key, step, time) for key, time in zip(keys[:25], times[:25], strict=True)]
            twins.delta(changes, [dead(key, time) for key, time in zip(keys[25:], times[25:], strict=True)])
        if step % 2:
            sync(twins.root)
            twins.check()
    sync(twins.root)
    twins.check()


def test_a_dry_run_counts_what_is_then_written(twins: Twins) -> None:
    big = [row(key, 1) | {"text": "x" * (700 * key)} for key in range(5)]
    twins.snapshot([*(row(key, 1) for key in range(5, 100)), *big])
    assert len(sync(twins.root, dry_run=True)) == 1
    with pytest.raises(TableMissing):
        items(twins.table)
    for _ in range(2):
        counted = sync(twins.root, dry_run=True)
        written = sync(twins.root)
        for one, other in zip(counted, written, strict=True):
            assert (one.puts, one.deletes, one.unchanged) == (other.puts, other.deletes, other.unchanged)
            # Besides the rows, a sync writes the schema and the progress of the table.
            assert one.estimated_units == other.estimated_units == other.write_units - 2
        twins.delta([row(key, 2, 9) for key in range(5, 50)], [dead(key, 9) for key in range(50, 60)])
        twins.delta(big[:3])
    twins.snapshot([row(key, 3, 3) for key in range(20)])
    done = shoal("sync-dynamodb", "--from", twins.root, "--dry-run", "--write-price", "1.5", "--json")
    assert done.returncode == 0, done.stderr
    counted_by_command = [json.loads(line) for line in done.stdout.splitlines()]
    assert [entry["dollars"] for entry in counted_by_command] == [
        entry["estimated_units"] * 1.5e-6 for entry in counted_by_command
    ]
    assert len(items(twins.table)) == 90


def _leave_out(body: bytes, content: bytes) -> bytes:
    """Return an answer that says that some of the writes were not processed."""
    return orjson.dumps({"UnprocessedItems": {t: i[::3] for t, i in orjson.loads(body)["RequestItems"].items()}})


def test_a_network_that_fails_loses_nothing(twins: Twins, network: FaultyNetwork) -> None:
    twins.snapshot([row(key, 1) for key in range(300)])
    throttled = {"status": 400, "code": "ProvisionedThroughputExceededException"}
    for fault in ({"status": 500}, throttled, {"lost": True}, {"cut": 0}, {"changes": _leave_out}, {"late": 0.1}):
        network.fail(method="POST", text="BatchWriteItem", times=2, **fault)
    (first,) = sync(twins.root)
    assert (first.puts, first.retries >= 8) == (300, True)
    twins.check()
    for fault in ({"status": 500}, throttled, {"lost": True}, {"cut": 0}, {"late": 0.1}):
        network.fail(method="POST", text="q <= :q", times=4, **fault)
    twins.delta([row(key, 2, 9) for key in range(50)], [dead(key, 9) for key in range(50, 90)])
    (second,) = sync(twins.root)
    assert (second.puts, second.deletes) == (50, 40)
    assert second.retries >= 16
    twins.check()
    for fault in ({"status": 500}, throttled, {"lost": True}):
        network.fail(method="POST", text="Scan{", times=2, **fault)
    twins.snapshot([row(key, 3, 3) for key in range(200)])
    (third,) = sync(twins.root)
    assert (third.puts, third.deletes) == (200, 100)
    twins.check()


def test_what_does_not_pass_is_told_and_gone_on_with(
    twins: Twins, network: FaultyNetwork, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    twins.snapshot([row(key, 1) for key in range(100)])
    with monkeypatch.context() as impatient:
        impatient.setattr("shoal.loaders.dynamodb.table._SECONDS", 0.5)
        impatient.setattr("shoal.loaders.dynamodb.table._ATTEMPTS", 2)
        network.fail(method="POST", text="DescribeTable", times=1e9, hangs=True)
        with pytest.raises(TableFailed, match=r"has not answered DescribeTable for 0\.5 s"):
            sync(twins.root)
        (told,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert re.fullmatch(r"table '.*': .* has not answered DescribeTable for 0.5 s; the request is retried.*", told)
        network.mend()
    monkeypatch.setattr("shoal.loaders.dynamodb.table._ATTEMPTS", 2)
    network.fail(method="POST", text="BatchWriteItem", times=1e9, status=400, code="AccessDeniedException")
    with pytest.raises(TableFailed, match="AccessDeniedException"):
        sync(twins.root)
    network.mend()
    network.fail(method="POST", text="BatchWriteItem", times=1e9, status=503)
    with pytest.raises(TableFailed, match="503"):
        sync(twins.root)
    network.mend()
    sync(twins.root)
    twins.check()
    # A damaged file: once there is a newer snapshot, the sync can skip the file.
    twins.delta([row(1, 2, 9)])
    broken = twins.root.entry("there", 2)
    (twins.root.directory(broken) / broken.files[0].path).write_bytes(b"bad")
    with pytest.raises(FileDamaged):
        sync(twins.root)
    twins.snapshot([row(key, 4, 20) for key in range(10)])
    sync(twins.root)
    assert len(items(twins.table)) == 10


def test_a_row_that_no_table_can_take_is_told_before_it_is_sent(twins: Twins) -> None:
    twins.snapshot([row(1, 1), row(2, 1) | {"text": "x" * 410_000}])
    for dry_run in (True, False):
        with pytest.raises(RowTooLarge, match="takes 410"):
            sync(twins.root, dry_run=dry_run)


DEATHS = [*(f"{point}:1" for point in FAILPOINTS if point.startswith("sync.")), "sync.rows-written:3"]


def test_a_sync_that_is_killed_anywhere_is_gone_on_with(twins: Twins, endpoint: str) -> None:
    twins.snapshot([row(key, 0) for key in range(200)])
    died = []
    for number, death in enumerate(DEATHS, 1):
        died += [death] if dies(twins, endpoint, death) else []
        forget_lease(twins.table)
        sync(twins.root)
        twins.check()
        if number % 3 == 2:
            twins.snapshot([row(key, number, 10 * number) for key in range(0, 390, 2)])
        else:
            changed = [row(key, number, 10 * number) for key in range(number, 390, 3)]
            twins.delta(changed, [dead(key, 10 * number) for key in range(number + 1, 390, 9)])
    assert died == DEATHS


def dies(twins: Twins, endpoint: str, point: str) -> bool:
    """Run a sync that is to die at a point, and return whether it reached the point."""
    arguments = (str(twins.root), endpoint, twins.table)
    with running(sync_in_steps, *arguments, die_at=point, log=twins.directory / "log") as process:
        process.join(PATIENCE_SECONDS)
        assert process.exitcode in (0, -signal.SIGKILL), (twins.directory / "log").read_text()
        return process.exitcode != 0


def test_one_process_at_a_time_writes_and_none_behind_another(twins: Twins, network: FaultyNetwork) -> None:
    twins.snapshot([row(key, 1) for key in range(100)])
    hanging = network.fail(method="POST", text="BatchWriteItem", times=1e9, hangs=True)
    command = [sys.executable, "-m", "shoal", "sync-dynamodb", "--from", str(twins.root), "--create-tables"]
    with subprocess.Popen([*command, "--lease-seconds", "2", "--poll", "0.1"], stderr=subprocess.PIPE) as other:
        eventually(lambda: hanging.met, "a sync that writes")
        with pytest.raises(TableTaken, match=f"{other.pid}"):
            sync(twins.root, lease_seconds=0.2)
        network.mend()
        eventually(lambda: len(items(twins.table)) == 100, "that it has written all")
        # The running sync also writes what is published meanwhile.
        twins.delta([row(1, 2, 9)])
        eventually(lambda: any(item["q"]["N"] == "2" for item in items(twins.table).values()), "the delta")
        hanging = network.fail(method="POST", text="q <= :q", times=1e9, hangs=True)
        twins.delta([row(2, 3, 9)])
        eventually(lambda: hanging.met, "a sync that writes")
        other.kill()
    network.mend()
    # The lease of the killed process ends soon, and another process takes over.
    assert [entry.seq for entry in sync(twins.root)] == [3]
    twins.check()


def test_a_table_of_another_root_or_of_others_is_left_alone(twins: Twins, table: str, tmp_path: Path) -> None:
    twins.snapshot([row(key, 1) for key in range(3)])
    twins.delta([row(1, 2, 9)])
    sync(twins.root)
    foreign = Twins(tmp_path / "other", table)
    foreign.snapshot([row(key, 5) for key in range(3)])
    with pytest.raises(ForeignDelta):
        sync(foreign.root)
    twins.check()
    done = shoal("sync-dynamodb", "--from", twins.root, "--view", "here", "--once")
    assert (done.returncode, "is kept on each node" in done.stderr) == (1, True), done.stderr
    with pytest.raises(TableMissing, match="create-tables"):
        sync(_elsewhere(tmp_path), create_tables=False)


def _elsewhere(tmp_path: Path) -> ExportRoot:
    twins = Twins(tmp_path / "third", "never-made")
    twins.snapshot([row(1, 1)])
    return twins.root


def test_a_damaged_note_of_progress_is_told(twins: Twins, network: FaultyNetwork) -> None:
    twins.snapshot([row(key, 1) for key in range(3)])
    sync(twins.root)
    network.fail(method="POST", text="GetItem", changes=lambda body, content: b'{"Item": {"s": {"N": "x"}}}')
    with pytest.raises(TableInvalid, match="progress"):
        sync(twins.root)
