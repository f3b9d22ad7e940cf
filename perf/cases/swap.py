"""The swap to a new generation of a million rows under a steady load: does a request fail, and does the p99 rise?

Requests over HTTP arrive at a fixed rate. In each round, the server first does nothing except answer these requests;
then a snapshot is published, loaded and served. The p99 of the two phases is compared round by round, because the
machine changes from minute to minute. The second phase lasts from the publication of the snapshot until a second after
every worker serves it, because requests touch the new pages for the first time in that second.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt

from perf import servers
from perf.dataset import Dataset, random_documents, write_again
from perf.report import Finding
from perf.scale import Scale
from perf.servers import write_bodies
from perf.stores import check, copy_of_root, copy_of_store, loaded, published
from shoal import FeatureStore

FEATURES = 50
KEYS = 100
WORKERS = 2
CONNECTIONS = 8
RATE = 400.0
_AFTER_SECONDS = 1.0


@dataclass(frozen=True)
class Swap:
    """The times of one round on the monotonic clock, in seconds: the start of the idle phase, the publication of the
    snapshot, the time when it is served, and the end of the round."""

    idle: float
    published: float
    served: float
    end: float


def run(scale: Scale) -> list[Finding]:
    """Measure swaps one after the other.

    Raises:
        AssertionError: a request failed.
    """
    data = Dataset(scale.rows, FEATURES)
    idle_seconds = 0.5 if scale.small else 3.0
    rounds = scale.rounds if scale.small else 3 * scale.rounds
    with tempfile.TemporaryDirectory(prefix="swap-", dir=scale.directory) as temporary:
        directory = Path(temporary)
        root = copy_of_root(published(scale.directory, data), directory / "root")
        store = copy_of_store(loaded(scale.directory, data), directory / "store")
        bodies = directory / "bodies.jsonl"
        each = directory / "each.bin"
        write_bodies(bodies, data, random_documents(data, KEYS, scale.requests))
        reader = FeatureStore.open(store)
        swaps = []
        with servers.shoal(store, workers=WORKERS, root=root.path) as server:
            load = _start_load(server.port, bodies, each, count=int(RATE * (rounds + 1) * (idle_seconds + 8)))
            try:
                time.sleep(idle_seconds)
                for _ in range(rounds):
                    manifest = write_again(root, data.view)
                    # Wait until the system has flushed the files to the disk: that work is not part of the server's
                    # work.
                    time.sleep(0.5)
                    idle = time.perf_counter()
                    time.sleep(idle_seconds)
                    moment = time.perf_counter()
                    root.publish(manifest)
                    while reader.version().view(data.view).record.applied_seq < manifest.seq:
                        time.sleep(0.002)
                    served = time.perf_counter()
                    time.sleep(_AFTER_SECONDS)
                    swaps.append(Swap(idle, moment, served, time.perf_counter()))
                load.terminate()
                told = json.loads(load.communicate()[0])
            finally:
                load.kill()
            check(store, data)
        due, latency = np.fromfile(each).reshape(-1, 2).T
    failures = told["failures"] + told["refused"]
    assert not failures, f"{failures} requests failed, {told['requests']} were answered"
    return _findings(data, swaps, due, latency, failures)


def _start_load(port: int, bodies: Path, each: Path, count: int) -> "subprocess.Popen[str]":
    arguments = ["--port", port, "--accept", "application/x-npy", "--bodies", bodies, "--connections", CONNECTIONS]
    arguments += ["--count", count, "--rate", RATE, "--each", each]
    command = [sys.executable, "-m", "perf.http_load", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _findings(
    data: Dataset, swaps: list[Swap], due: npt.NDArray[np.float64], latency: npt.NDArray[np.float64], failures: int
) -> list[Finding]:
    def p99(start: float, end: float) -> float:
        return float(np.percentile(latency[(due >= start) & (due < end)], 99))

    idle = [p99(swap.idle, swap.published) for swap in swaps]
    during = [p99(swap.published, swap.end) for swap in swaps]
    ratios = [one / other for one, other in zip(during, idle, strict=True)]
    case = f"swap of {data.rows:,} x {data.features} under {RATE:g} requests/s of {KEYS} keys"
    return [
        Finding(case, "published to served", median(swap.served - swap.published for swap in swaps), "s"),
        Finding(case, "failed", failures, "requests", at_most=0),
        Finding(case, "p99 idle", 1e3 * median(idle), "ms"),
        Finding(case, "p99 during a swap and the second after it", 1e3 * median(during), "ms"),
        Finding(case, "p99 during / idle", median(ratios), "x", at_most=1.5, detail={"ratios": ratios}),
    ]
