"""The effect of the writer's scrub on lookups: with the scrub off, at its normal pace, and at the pace after an unclean
shutdown.

Three servers have the same base. In each round, the servers are measured in turn, while the writers of the other
servers are stopped. The measured server answers a closed loop over HTTP, and this process does lookups in its store. So
all paces are measured in the same round, and their ratios are computed round by round.
"""

import os
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt

from perf import servers
from perf.dataset import Dataset, document_keys, random_documents
from perf.report import Finding
from perf.scale import Scale
from perf.stores import copy_of_store, loaded
from shoal import FeatureStore
from shoal.engine.process.control import writer_answers
from shoal.engine.process.run_directory import read_server_record
from shoal.engine.status.scrubbed import describe_scrub

FEATURES = 50
KEYS = 500
PACES = {"off": 0.0, "24 h": 24.0, "fast": 1e-4}
"""Name of the pace → `--scrub-hours`. If the disk is too slow for the period, the scrub always runs at the fast
pace."""
_SETTLING_SECONDS = 60.0


@dataclass(frozen=True)
class _Served:
    """A server with one pace of the scrub, its store opened in this process, and the process id of its writer."""

    server: servers.Server
    store: Path
    opened: FeatureStore
    writer: int

    def verified_bytes(self) -> int:
        """Return the number of bytes that the scrub has verified so far."""
        document = describe_scrub(self.store)
        return document["bytes_verified"] if document is not None else 0


def run(scale: Scale) -> list[Finding]:
    """Compare the latencies at each pace with those without a scrub. Also measure the bytes per second of the fast
    pace."""
    rows = scale.load_rows if scale.small else scale.load_rows // 2
    data = Dataset(rows, FEATURES)
    # Many short rounds, so that other work on the machine affects all paces equally.
    rounds, count = (1, scale.requests) if scale.small else (6 * scale.rounds, scale.requests // 10)
    requests = random_documents(data, KEYS, count)
    latencies: dict[str, dict[str, list[float]]] = {pace: {} for pace in PACES}
    fast_seconds = 0.0
    with tempfile.TemporaryDirectory(prefix="scrub-", dir=scale.directory) as temporary, ExitStack() as running:
        bodies = Path(temporary) / "bodies"
        servers.write_bodies(bodies, data, requests)
        served = {}
        for pace, hours in PACES.items():
            store = copy_of_store(loaded(scale.directory, data), Path(temporary) / pace.replace(" ", ""))
            served[pace] = running.enter_context(_serving(store, hours))
        verified_before = served["fast"].verified_bytes()
        # The first round brings the base into memory.
        for number in range(rounds + 1):
            for pace, one in served.items():
                os.kill(one.writer, signal.SIGCONT)
                began = time.monotonic()
                measured = _measure(one, bodies, requests)
                if number:
                    for what, seconds in measured.items():
                        latencies[pace].setdefault(what, []).append(seconds)
                if pace == "fast":
                    fast_seconds += time.monotonic() - began
                os.kill(one.writer, signal.SIGSTOP)
        # The scrub records its progress only every few seconds, so only the sum over all rounds is meaningful.
        fast_bytes = served["fast"].verified_bytes() - verified_before
        for one in served.values():
            os.kill(one.writer, signal.SIGCONT)
    return [
        *_findings(latencies),
        Finding("scrub", "verified at the fast pace under load", fast_bytes / fast_seconds / 1e6, "MB/s"),
    ]


@contextmanager
def _serving(store: Path, hours: float) -> Iterator[_Served]:
    """Run a server, wait until the scrub at its start is done, and then stop its writer."""
    with servers.shoal(store, scrub_hours=hours, silent_seconds=3600) as server:
        while not writer_answers(store):
            time.sleep(0.05)
        deadline = time.monotonic() + _SETTLING_SECONDS
        while hours > 1 and time.monotonic() < deadline and (describe_scrub(store) or {}).get("suspect_chunks") != 0:
            time.sleep(0.05)
        record = read_server_record(store)
        assert record is not None
        assert record.writer is not None
        os.kill(record.writer, signal.SIGSTOP)
        yield _Served(server, store, FeatureStore.open(store), record.writer)


def _measure(served: _Served, bodies: Path, requests: Sequence[npt.NDArray[np.int64]]) -> dict[str, float]:
    load = servers.put_under_load(served.server, bodies, count=len(requests), accept="application/x-npy").load
    seconds = []
    for documents in requests:
        keys = document_keys(documents)
        began = time.perf_counter()
        served.opened.lookup_matrix(["docs:*"], {"doc_id": keys})
        seconds.append(time.perf_counter() - began)
    p50, p99 = np.percentile(seconds, (50, 99))
    return {"HTTP p50": load["p50"], "HTTP p99": load["p99"], "in process p50": p50, "in process p99": p99}


def _findings(latencies: dict[str, dict[str, list[float]]]) -> Iterator[Finding]:
    off = latencies["off"]
    for pace in list(PACES)[1:]:
        for what, seconds in latencies[pace].items():
            ratios = [one / other for one, other in zip(seconds, off[what], strict=True)]
            detail = {"ratios": ratios, "milliseconds": [1e3 * one for one in seconds]}
            yield Finding("scrub", f"{what}, {pace}, against off", median(ratios), "times", detail=detail)
