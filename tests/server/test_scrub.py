"""Flipped bits under a running server are found by the scrub, are no longer served, and are repaired from the root."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

from shoal import FeatureStore
from shoal.cli import shoal
from shoal.engine.format.layout import CHECKSUM_OFFSET
from shoal.engine.format.paths import generation_path, live_path
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.store.segment import Chunk
from tests import stores
from tests.server.serving import PATIENCE_SECONDS, Server, eventually, is_gone

DOC = stores.schema("doc", key="string", a="int64", text="string")
OTHER = stores.schema("other", key="int64", a="int64")
COUNT = 400
KEYS = {"doc_id": [f"key-{number}" for number in range(COUNT)], "other_id": 1}
SOON_HOURS = 0.5 / 3600
OF_THE_BASE = [2] * COUNT
WHOLE = [3] * 100 + OF_THE_BASE[100:]

PLACES = {
    "checksum": lambda chunk: CHECKSUM_OFFSET + 2,
    "hash": lambda chunk: chunk.header.hashes + 8 * 30 + 7,
    "second hash": lambda chunk: chunk.header.row_data + 50 * chunk.header.stride + 3,
    "event time": lambda chunk: chunk.header.row_data + 51 * chunk.header.stride + 12,
    "presence": lambda chunk: chunk.header.row_data + 52 * chunk.header.stride + 16,
    "value": lambda chunk: chunk.header.row_data + 53 * chunk.header.stride + chunk.header.stride - 10,
    "directory": lambda chunk: chunk.header.directory + 41,
    "heap": lambda chunk: chunk.header.heap + 777,
    "key": lambda chunk: chunk.header.keys + 55,
    "the end": lambda chunk: chunk.header.total - 1,
}
"""Name → offset in a chunk of the bit to flip. The header's section offsets are also checked whenever a chunk is
opened."""


def rows(value: int, count: int = COUNT) -> list[stores.Row]:
    return [{"doc_id": f"key-{number}", "a": value, "text": f"{value}/{number} " * 9} for number in range(count)]


@pytest.fixture
def root(tmp_path: Path) -> ExportRoot:
    root = ExportRoot(tmp_path / "root")
    stores.publish_snapshot(root, DOC, rows(1), files=1)
    stores.publish_snapshot(root, OTHER, [{"other_id": 1, "a": 1}])
    return root


@pytest.fixture
def store(tmp_path: Path, root: ExportRoot) -> Path:
    """A store with two views: `doc` has a base, an overlay and a kept generation."""
    stores.load(tmp_path / "store", root)
    stores.publish_snapshot(root, DOC, rows(2), files=1)
    stores.publish_delta(root, DOC, rows(3, 100), files=1)
    stores.load(tmp_path / "store", root)
    return tmp_path / "store"


def turn_bit(store: Path, which: str, place: str) -> None:
    """Flip a bit of a segment, in its file and in the page cache."""
    view = FeatureStore.open(store).version().view("doc")
    segment = view.segments[0 if which == "overlay" else -1]
    chunk: Chunk = segment.chunks[0]
    at = PLACES[place](chunk)  # type: ignore[no-untyped-call]
    if which == "overlay":
        path = live_path(store) / "data.mdb"
        at += path.read_bytes().index(chunk.bytes[: chunk.header.total].tobytes())
    else:
        record = view.record.kept[0] if which == "kept" else segment.record
        path = generation_path(store, "doc", record.id) / "data.mdb"
        at += record.offsets[0]
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 2]))


def metric(server: Server, name: str) -> float:
    lines = server.ask("GET", "/metrics").body.decode().splitlines()
    return float(next((line.rpartition(" ")[2] for line in lines if line.startswith(name)), "nan"))


def is_whole(server: Server) -> bool:
    """Return whether the view is served correctly again, after asserting that no wrong value is served."""
    answer = server.lookup(["doc:a", "doc:text"], KEYS)
    if answer.status == 503:
        assert answer.error[0] == "ViewDamaged"
        return False
    features = answer.json["features"]
    if features["doc:a"] == OF_THE_BASE:
        # The deltas after the base are being applied again.
        return False
    assert features["doc:a"] == WHOLE
    assert features["doc:text"][7] == "3/7 " * 9
    assert features["doc:text"][COUNT - 1] == f"2/{COUNT - 1} " * 9
    return True


def found(server: Server) -> float:
    return metric(server, "shoal_scrub_damaged_chunks_total")


def await_repair(server: Server, turned: int, where: str) -> None:
    """Wait until this number of chunks was found damaged and the view is repaired."""
    eventually(lambda: found(server) == turned, lambda: f"a bit that turned in {where}; the log is\n{server.log}")
    eventually(lambda: is_whole(server), lambda: f"the repair of {where}; the log is\n{server.log}")
    assert server.lookup(["other:a"], KEYS).json["features"]["other:a"] == [1] * COUNT


def test_every_bit_that_turns_is_found_and_repaired(store: Path, root: ExportRoot) -> None:
    places = [*(("base", place) for place in PLACES), ("overlay", "value"), ("overlay", "heap")]
    with Server(store, {"root": str(root)}, scrub_hours=SOON_HOURS) as server:
        server.await_ready()
        for number, (which, place) in enumerate(places):
            turn_bit(store, which, place)
            await_repair(server, number + 1, f"{which}, {place}")
        turn_bit(store, "kept", "value")
        eventually(lambda: metric(server, 'shoal_view_kept_damaged{view="doc"}') == 1, "the kept generation's damage")
        eventually(lambda: metric(server, 'shoal_view_trouble{view="doc"}') == 0, "the end of all troubles")
        assert is_whole(server)
        kept = FeatureStore.open(store).version().view("doc").record.kept[0]
        refused = server.ask("POST", "/v1/reload", {"view": "doc", "snapshot": kept.id})
        assert (refused.status, refused.error[0]) == (404, "GenerationNotKept")
        assert metric(server, "shoal_scrub_age_seconds") < PATIENCE_SECONDS
        assert metric(server, "shoal_scrub_period_seconds") == pytest.approx(3600 * SOON_HOURS)
        status = server.ask("GET", "/v1/status").json
        assert status["scrub"]["damaged_chunks"] == len(places) + 1
        printed = CliRunner().invoke(shoal, ["status", "--store", str(store)])
        assert printed.exit_code == 1
        assert f"doc: nobody can go back to the kept generation {kept.id}" in printed.output
        assert f"{len(places) + 1} damaged chunks found" in printed.output
        assert "Traceback" not in server.log


def test_without_a_root_the_view_is_refused_by_all_workers(store: Path) -> None:
    with Server(store, {"root": None}, scrub_hours=SOON_HOURS) as server:
        server.await_ready()
        turn_bit(store, "base", "value")
        eventually(lambda: found(server) == 1, "the damage")
        eventually(lambda: metric(server, 'shoal_view_damaged{view="doc"}') == 1, "the view's trouble")
        # Twenty requests reach both workers.
        for _ in range(20):
            refused = server.lookup(["doc:a"], KEYS)
            assert (refused.status, refused.error[0]) == (503, "ViewDamaged")
            assert "has the checksum" in refused.error[1]
            assert server.lookup(["other:a"], KEYS).status == 200


def kill_all(server: Server) -> None:
    """Kill all processes of a server at once, as a power failure does."""
    processes = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
    server.process.wait(PATIENCE_SECONDS)
    eventually(lambda: all(is_gone(process.pid) for process in processes), "the end of all processes")


def stop(server: Server) -> None:
    """Stop a server with SIGTERM, as systemd does."""
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(PATIENCE_SECONDS) == 0


def scrub_of(server: Server) -> Any:
    return server.ask("GET", "/v1/status").json["scrub"] or {}


def test_all_is_verified_at_once_behind_an_unclean_shutdown_and_only_then(store: Path, root: ExportRoot) -> None:
    writer = {"root": str(root)}
    with Server(store, writer, scrub_hours=24) as server:
        server.await_ready()
        # A store that no scrub has read yet is suspect, too.
        eventually(lambda: scrub_of(server).get("suspect_chunks") == 0, "a store that was verified")
        verified = scrub_of(server)["bytes_verified"]
        stop(server)
    turn_bit(store, "base", "value")
    with Server(store, writer, scrub_hours=24) as server:
        server.await_ready()
        eventually(lambda: server.log.count("writer started") == 2, "the writer")
        time.sleep(1.5)
        scrub = scrub_of(server)
        assert (scrub["suspect_chunks"], scrub["bytes_verified"]) == (0, verified), "it goes on where it was"
        assert found(server) == 0
        kill_all(server)
    with Server(store, writer, scrub_hours=24) as server:
        server.await_ready()
        eventually(lambda: found(server) == 1, lambda: f"the damage; the log is\n{server.log}")
        eventually(lambda: is_whole(server), "the repair")
        assert server.log.count("the store was not closed cleanly") == 2


def test_a_scrub_that_is_off_reads_nothing(store: Path, root: ExportRoot) -> None:
    with Server(store, {"root": str(root)}, scrub_hours=0) as server:
        server.await_ready()
        turn_bit(store, "base", "value")
        time.sleep(1)
        assert scrub_of(server) == {}
        assert "shoal_scrub" not in server.ask("GET", "/metrics").body.decode()
        assert server.lookup(["doc:a"], KEYS).status == 200
