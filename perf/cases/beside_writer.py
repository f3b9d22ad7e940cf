"""The effect of a server's writer on lookups: while it applies deltas, and while it loads a snapshot.

A process runs lookups without a pause, on one of two cores. The latency of these lookups while the writer loads a new
entry is compared with their latency just before. The server's own worker is idle.
"""

import asyncio
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from perf import servers
from perf.dataset import Dataset, distinct_documents, random_documents, write_again, write_delta
from perf.reading import Lookups, reading
from perf.report import Finding
from perf.scale import Scale
from perf.stores import check, copy_of_root, copy_of_store, loaded, published
from shoal.engine.process.control import WriterClient
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.root.manifest import Manifest

FEATURES = 50
KEYS = 500
CHANGED_SHARE = 0.01


@dataclass(frozen=True)
class Span:
    """A span of time between two times of the monotonic clock, in seconds."""

    start: float
    end: float

    @property
    def seconds(self) -> float:
        """The length of the span in seconds."""
        return self.end - self.start


@dataclass(frozen=True)
class Work:
    """The span of one piece of the writer's work, and the idle spans before and after it."""

    before: Span
    work: Span
    after: Span


def run(scale: Scale) -> list[Finding]:
    """Measure lookups during deltas of 1% of the rows, one after the other, and then during a new snapshot."""
    data = Dataset(scale.load_rows, FEATURES)
    requests = random_documents(data, KEYS, scale.requests)
    rest_seconds = 0.2 if scale.small else 1.0
    with tempfile.TemporaryDirectory(prefix="beside-writer-", dir=scale.directory) as temporary:
        root = copy_of_root(published(scale.directory, data), Path(temporary) / "root")
        store = copy_of_store(loaded(scale.directory, data), Path(temporary) / "store")
        with servers.shoal(store, root=root.path), reading(store, data, requests) as lookups:
            deltas = []
            for change in range(1, 2 * scale.rounds + 1):
                changed = distinct_documents(data, int(data.rows * CHANGED_SHARE), seed=change)
                manifest = write_delta(root, data, changed, change)
                deltas.append(_publish(manifest, root, store, rest_seconds))
                check(store, data, changed, change)
            swap = _publish(write_again(root, data.view), root, store, rest_seconds)
            check(store, data)
    of = f"in process, {KEYS} x {FEATURES} of {data.rows:,}, while"
    return [
        *_findings(f"{of} a delta of {changed.size:,} is applied", lookups, deltas, bar=1.5),
        *_findings(f"{of} a snapshot is loaded", lookups, [swap], bar=None),
    ]


def _publish(manifest: Manifest, root: ExportRoot, store: Path, rest_seconds: float) -> Work:
    # Wait until the caches and the disk are quiet again: the writing of the files is not part of the writer's work.
    time.sleep(rest_seconds)
    before = _rest(rest_seconds)
    started = time.perf_counter()
    root.publish(manifest)
    # The reload returns when nothing is left to apply or to merge, even if the writer had already begun by itself.
    asyncio.run(WriterClient(store).reload())
    return Work(before, Span(started, time.perf_counter()), _rest(rest_seconds))


def _rest(seconds: float) -> Span:
    started = time.perf_counter()
    time.sleep(seconds)
    return Span(started, time.perf_counter())


def _findings(case: str, lookups: Lookups, works: Sequence[Work], bar: float | None) -> list[Finding]:
    def p99(span: Span) -> float:
        return float(np.percentile(lookups.seconds(span.start, span.end), 99))

    during = [lookups.seconds(work.work.start, work.work.end) for work in works]
    ratios = [p99(work.work) / p99(work.before) for work in works]
    return [
        Finding(case, "that takes", median(work.work.seconds for work in works), "s"),
        Finding(case, "p99 before", 1e6 * median(p99(work.before) for work in works), "us"),
        Finding(case, "p99 meanwhile", 1e6 * median(p99(work.work) for work in works), "us"),
        Finding(case, "p99 after", 1e6 * median(p99(work.after) for work in works), "us"),
        Finding(
            *(case, "p99 meanwhile / before", median(ratios), "x"),
            at_most=bar,
            detail={"ratios": ratios, "lookups": [times.size for times in during]},
        ),
        Finding(case, "longest meanwhile", 1e3 * median(float(times.max()) for times in during), "ms"),
    ]
