"""The time until a server is ready, and the memory of a worker, for stores of several sizes."""

import statistics
import time
from pathlib import Path

import psutil

from perf import servers
from perf.dataset import Dataset, random_documents
from perf.report import Finding
from perf.scale import Scale
from perf.servers import put_under_load, write_bodies
from perf.stores import loaded
from shoal.engine.process.run_directory import read_server_record

FEATURES = 50
REQUESTS = 200
KEYS = 500


def run(scale: Scale) -> list[Finding]:
    """Measure servers on stores of three sizes."""
    findings = []
    for rows in sorted({min(100_000, scale.rows), scale.rows, scale.many_rows}):
        data = Dataset(rows, FEATURES)
        store = loaded(scale.directory, data)
        seconds = [seconds_until_ready(store) for _ in range(scale.rounds)]
        added = added_pss(store, data, scale.directory)
        case = f"start on {rows:,} rows"
        findings.append(Finding(case, "seconds until ready", statistics.median(seconds), "s", at_most=1.5))
        findings.append(Finding(case, "PSS that one more worker adds", added, "MB", at_most=60.0))
    return findings


def seconds_until_ready(store: Path) -> float:
    """Return the seconds from starting `shoal serve` with one worker until it reports that it is ready."""
    started = time.perf_counter()
    with servers.shoal(store):
        return time.perf_counter() - started


def added_pss(store: Path, data: Dataset, directory: Path) -> float:
    """Return the additional memory (PSS) of all processes with three workers compared with two, in MB.

    The same rows are looked up before each measurement. In PSS, a page of the store counts once, however many processes
    have mapped it.
    """
    bodies = directory / "bodies-starts.jsonl"
    write_bodies(bodies, data, random_documents(data, KEYS, REQUESTS))
    totals = []
    for workers in (2, 3):
        with servers.shoal(store, workers=workers) as server:
            put_under_load(server, bodies, count=2 * REQUESTS, accept="application/x-npy", connections=8)
            record = read_server_record(store)
            assert record is not None
            pids = [record.pid, *record.workers, *([record.writer] if record.writer else [])]
            totals.append(sum(psutil.Process(pid).memory_full_info().pss for pid in pids))
    return (totals[1] - totals[0]) / 1e6
