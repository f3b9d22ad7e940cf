"""Pushes over HTTP: the rate of acknowledged rows and the latency of pushes, with one client and with several. A row is
acknowledged when it is on disk and visible to all readers.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt
import orjson

from perf import servers
from perf.dataset import Dataset, distinct_documents, document_keys, values
from perf.report import Finding
from perf.scale import Scale
from perf.servers import Outcome, Server, put_under_load
from perf.stores import check, copy_of_store, loaded, published

FEATURES = 50
ROWS_A_PUSH = (1, 100, 1_000)
CONNECTIONS = (1, 16)
WORKERS = 2
_SECONDS = 2.0
_GUESSED_ROWS_A_SECOND = {1: 600, 100: 20_000, 1_000: 60_000}


def run(scale: Scale) -> list[Finding]:
    """Measure pushes of one row, of a hundred and of a thousand rows, with all features."""
    data = Dataset(scale.rows, FEATURES)
    findings = []
    with tempfile.TemporaryDirectory(prefix="pushes-", dir=scale.directory) as temporary:
        root = published(scale.directory, data)
        store = copy_of_store(loaded(scale.directory, data), Path(temporary) / "store")
        with servers.shoal(store, workers=WORKERS, root=root.path) as server:
            change = 0
            for rows in ROWS_A_PUSH:
                for connections in CONNECTIONS:
                    outcomes = []
                    for _ in range(scale.rounds):
                        change += 1
                        outcomes.append(_push(server, store, data, rows, connections, change, scale))
                    findings += _findings(rows, connections, outcomes)
    return findings


def _push(
    server: Server, store: Path, data: Dataset, rows: int, connections: int, change: int, scale: Scale
) -> Outcome:
    count = 5 if scale.small else max(20, int(_SECONDS * _GUESSED_ROWS_A_SECOND[rows] / rows))
    documents = distinct_documents(data, min(data.rows, rows * count), seed=change)
    parts = np.array_split(documents, max(1, documents.size // rows))
    bodies = store.parent / "pushes.jsonl"
    bodies.write_bytes(b"\n".join(_body(data, part, change) for part in parts))
    outcome = put_under_load(server, bodies, count=len(parts), path="/v1/push", connections=connections)
    check(store, data, documents, change)
    return outcome


def _body(data: Dataset, documents: npt.NDArray[np.int64], change: int) -> bytes:
    columns = {f"f{number}": values(documents, number, change).tolist() for number in range(data.features)}
    return orjson.dumps({"view": data.view, "rows": {"doc_id": document_keys(documents), **columns}})


def _findings(rows: int, connections: int, outcomes: Sequence[Outcome]) -> list[Finding]:
    case = f"pushes of {rows:,} x {FEATURES} over HTTP, {connections} at a time"

    def typical(name: str) -> float:
        return float(median(outcome.load[name] for outcome in outcomes))

    return [
        Finding(case, "rows acknowledged", rows * typical("requests_per_second"), "1/s"),
        Finding(case, "p50 until durable and visible", 1e3 * typical("p50"), "ms"),
        Finding(case, "p95 until durable and visible", 1e3 * typical("p95"), "ms", at_most=100.0),
        Finding(case, "workers' CPU a push", 1e3 * median(outcome.cpu_per_request for outcome in outcomes), "ms"),
    ]
