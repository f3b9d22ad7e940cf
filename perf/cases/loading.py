"""Getting data in: full loads against reading and writing as many bytes, deltas, freshness, starts, memory."""

import os
import shutil
import statistics
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil
import pyarrow.parquet as pq

from engine import FeatureStore
from engine.environment import generations_path
from engine.export_root import ExportRoot
from engine.run_directory import read_server_record
from perf import servers
from perf.dataset import Dataset, document_keys, matrix, publish_delta, random_documents
from perf.measure import alternate, ratio
from perf.report import Finding
from perf.scale import Scale
from perf.stores import bring_up_to_date, loaded, published

FEATURES = 50
WRITE_BLOCK = 128 << 20


def run(scale: Scale) -> list[Finding]:
    """A full load from Parquet, against pyarrow reading the same files and as many bytes being written and synced."""
    data = Dataset(scale.load_rows, FEATURES)
    root = published(scale.directory, data)
    store = scale.directory / "load"

    def load() -> float:
        shutil.rmtree(store, ignore_errors=True)
        started = time.perf_counter()
        bring_up_to_date(store, root)
        return time.perf_counter() - started

    def read_and_write() -> float:
        files = sorted(root.path.rglob("*.parquet"))
        size = stored_bytes(store, data.view)
        started = time.perf_counter()
        for file in files:
            parquet = pq.ParquetFile(file)
            for group in range(parquet.num_row_groups):
                parquet.read_row_group(group)
        with (scale.directory / "bytes").open("wb") as stream:
            block = os.urandom(1 << 20) * (WRITE_BLOCK >> 20)
            for start in range(0, size, WRITE_BLOCK):
                stream.write(block[: size - start])
                stream.flush()
                os.fsync(stream.fileno())
        return time.perf_counter() - started

    costs = alternate({"load": load, "floor": read_and_write}, min(scale.rounds, 3))
    check(store, data)
    case = f"full load of {data.rows:,} x {FEATURES}"
    seconds = statistics.median(costs["load"])
    findings = [
        Finding(case, "seconds", seconds, "s"),
        Finding(case, "rows a second", data.rows / seconds, "1/s"),
        Finding(case, "pyarrow reads, as many bytes are written", statistics.median(costs["floor"]), "s"),
        Finding(case, "load / that", ratio(costs, "load", "floor"), "x", at_most=2.0),
        _bytes_per_row(store, data),
    ]
    return findings + _delta(scale, data, root, store, seconds)


def _bytes_per_row(store: Path, data: Dataset) -> Finding:
    keys = float(np.mean([len(key) for key in document_keys(random_documents(data, 10_000, 1)[0])]))
    bar = 1.1 * (4 * data.features + keys) + 28
    each = stored_bytes(store, data.view) / data.rows
    case = f"store of {data.rows:,} x {FEATURES}"
    return Finding(case, "bytes a row", each, "B", at_most=bar, detail={"values and keys": 4 * data.features + keys})


def _delta(scale: Scale, data: Dataset, root: ExportRoot, store: Path, load_seconds: float) -> list[Finding]:
    """A delta of 1% over what was just loaded."""
    changed = np.random.default_rng(7).choice(data.rows, data.rows // 100, replace=False).astype(np.int64)
    publish_delta(root, data, changed, change=1)
    started = time.perf_counter()
    bring_up_to_date(store, root)
    seconds = time.perf_counter() - started
    check(store, data, changed, change=1)
    shutil.rmtree(root.path)  # It is no longer what `published` promises.
    case = f"delta of {changed.size:,} rows over {data.rows:,}"
    return [
        Finding(case, "seconds", seconds, "s"),
        Finding(case, "delta / full load", seconds / load_seconds, "x", at_most=0.03),
    ]


def run_freshness(scale: Scale) -> list[Finding]:
    """From a delta's publication until every worker serves it, over a small and a large base."""
    findings = []
    for rows in sorted({min(100_000, scale.rows), scale.load_rows}):
        data = Dataset(rows, FEATURES, view="fresh")
        root = published(scale.directory, data)
        store = scale.directory / f"fresh-{rows}"
        bring_up_to_date(store, root)
        count = 4 if scale.small else 40
        seconds = _publish_and_wait(store, root, data, count)
        shutil.rmtree(store)
        shutil.rmtree(root.path)
        case = f"delta of 1,000 rows over {rows:,}, published to served"
        findings += [
            Finding(case, "p50", float(np.percentile(seconds, 50)), "s"),
            Finding(case, "p95", float(np.percentile(seconds, 95)), "s", at_most=1.0),
        ]
    return findings


def _publish_and_wait(store: Path, root: ExportRoot, data: Dataset, count: int) -> list[float]:
    generator, seconds = np.random.default_rng(3), []
    reader = FeatureStore.open(store)
    with servers.shoal(store, workers=2, root=root.path):
        for change in range(1, count + 1):
            changed = generator.choice(data.rows, min(1000, data.rows // 2), replace=False).astype(np.int64)
            manifest = publish_delta(root, data, changed, change)
            published_at = time.perf_counter()
            # What one process sees all see: the version is in memory that they share.
            while reader.version().view(data.view).record.applied_seq < manifest.seq:
                time.sleep(0.001)
            seconds.append(time.perf_counter() - published_at)
            check(store, data, changed, change)
    return seconds


def run_starts(scale: Scale) -> list[Finding]:
    """How long a server takes until it is ready, and what a worker takes of memory, whatever the store's size."""
    findings = []
    for rows in (min(100_000, scale.rows), scale.rows, scale.many_rows):
        data = Dataset(rows, FEATURES)
        store = loaded(scale.directory, data)
        seconds = []
        for _ in range(scale.rounds):
            started = time.perf_counter()
            with servers.shoal(store):
                seconds.append(time.perf_counter() - started)
        case = f"start on {rows:,} rows"
        findings.append(Finding(case, "seconds until ready", statistics.median(seconds), "s", at_most=1.5))
        findings.append(Finding(case, "PSS that one more worker adds", _added_pss(store, data), "MB", at_most=60.0))
    return findings


def _added_pss(store: Path, data: Dataset) -> float:
    """What all processes together take more with three workers than with two, after all rows were looked up."""
    totals = []
    for workers in (2, 3):
        with servers.shoal(store, workers=workers):
            record = read_server_record(store)
            assert record is not None
            pids = [record.pid, *record.workers, *([record.writer] if record.writer else [])]
            totals.append(sum(psutil.Process(pid).memory_full_info().pss for pid in pids))
    return (totals[1] - totals[0]) / 1e6


def stored_bytes(store: Path, view: str) -> int:
    """The bytes of a view's base generations on disk."""
    return sum(path.stat().st_size for path in generations_path(store, view).rglob("data.mdb"))


def check(store: Path, data: Dataset, changed: npt.NDArray[np.int64] | None = None, change: int = 0) -> None:
    """Hold what a store answers against the formula."""
    documents = changed if changed is not None else random_documents(data, 1000, 1)[0]
    documents = documents[:1000]
    found = FeatureStore.open(store).lookup_matrix(data.references, {"doc_id": document_keys(documents)}).matrix
    if not np.array_equal(found, matrix(documents, data.features, change)):
        raise AssertionError(f"{store} answers wrongly")
