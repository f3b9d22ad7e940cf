"""Loading: the time of a full load compared with that of reading and writing as many bytes; the time of a delta over
the loaded store; and the bytes per row."""

import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from perf.dataset import Dataset, distinct_documents, document_keys, publish_delta, random_documents
from perf.measure import alternate, ratio
from perf.report import Finding
from perf.scale import Scale
from perf.stores import bring_up_to_date, check, copy_of_root, published, stored_bytes
from shoal.engine.root.export_root import ExportRoot

FEATURES = 50
WRITE_BLOCK = 128 << 20


def run(scale: Scale) -> list[Finding]:
    """Measure a full load from Parquet. The floor is to read the same files with pyarrow, and to write and sync as many
    bytes."""
    data = Dataset(scale.load_rows, FEATURES)
    with tempfile.TemporaryDirectory(prefix="load-", dir=scale.directory) as temporary:
        workspace = Path(temporary)
        root = copy_of_root(published(scale.directory, data), workspace / "root")
        store = workspace / "store"

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
            with (workspace / "bytes").open("wb") as stream:
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
        return [
            Finding(case, "seconds", seconds, "s"),
            Finding(case, "rows a second", data.rows / seconds, "1/s"),
            Finding(case, "pyarrow reads, as many bytes are written", statistics.median(costs["floor"]), "s"),
            Finding(case, "load / that", ratio(costs, "load", "floor"), "x", at_most=2.0),
            _bytes_per_row(store, data),
            *_delta(data, root, store, seconds),
        ]


def _bytes_per_row(store: Path, data: Dataset) -> Finding:
    keys = float(np.mean([len(key) for key in document_keys(random_documents(data, 10_000, 1)[0])]))
    bar = 1.1 * (4 * data.features + keys) + 28
    each = stored_bytes(store, data.view) / data.rows
    case = f"store of {data.rows:,} x {FEATURES}"
    return Finding(case, "bytes a row", each, "B", at_most=bar, detail={"values and keys": 4 * data.features + keys})


def _delta(data: Dataset, root: ExportRoot, store: Path, load_seconds: float) -> list[Finding]:
    """Measure a delta of 1% over the store that was just loaded."""
    changed = distinct_documents(data, data.rows // 100, seed=7)
    publish_delta(root, data, changed, change=1)
    started = time.perf_counter()
    bring_up_to_date(store, root)
    seconds = time.perf_counter() - started
    check(store, data, changed, change=1)
    case = f"delta of {changed.size:,} rows over {data.rows:,}"
    return [
        Finding(case, "seconds", seconds, "s"),
        Finding(case, "delta / full load", seconds / load_seconds, "x", at_most=0.03),
    ]
