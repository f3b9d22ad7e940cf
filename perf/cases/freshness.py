"""The time from a delta's publication until every worker serves it, over a small and a large base."""

import tempfile
import time
from pathlib import Path

import numpy as np

from perf import servers
from perf.dataset import Dataset, distinct_documents, publish_delta
from perf.report import Finding
from perf.scale import Scale
from perf.stores import check, copy_of_root, copy_of_store, loaded, published
from shoal import FeatureStore
from shoal.engine.root.export_root import ExportRoot

FEATURES = 50
CHANGED = 1000


def run(scale: Scale) -> list[Finding]:
    """Measure deltas one after the other; wait for each to be served."""
    findings = []
    for rows in sorted({min(100_000, scale.rows), scale.load_rows}):
        data = Dataset(rows, FEATURES)
        with tempfile.TemporaryDirectory(prefix="freshness-", dir=scale.directory) as temporary:
            root = copy_of_root(published(scale.directory, data), Path(temporary) / "root")
            store = copy_of_store(loaded(scale.directory, data), Path(temporary) / "store")
            seconds = _publish_and_wait(store, root, data, 4 if scale.small else 40)
        case = f"delta of {CHANGED:,} rows over {rows:,}, published to served"
        findings += [
            Finding(case, "p50", float(np.percentile(seconds, 50)), "s"),
            Finding(case, "p95", float(np.percentile(seconds, 95)), "s", at_most=1.0),
        ]
    return findings


def _publish_and_wait(store: Path, root: ExportRoot, data: Dataset, count: int) -> list[float]:
    seconds = []
    reader = FeatureStore.open(store)
    with servers.shoal(store, workers=2, root=root.path):
        for change in range(1, count + 1):
            changed = distinct_documents(data, CHANGED, seed=change)
            manifest = publish_delta(root, data, changed, change)
            published_at = time.perf_counter()
            # If one process sees a version, all processes see it: the version is in shared memory.
            while reader.version().view(data.view).record.applied_seq < manifest.seq:
                time.sleep(0.001)
            seconds.append(time.perf_counter() - published_at)
            check(store, data, changed, change)
    return seconds
