"""What lookups notice of the writer's scrub: off, at its normal pace, and at the pace after an unclean shutdown.

Three servers have the same base, and one after the other answers a closed loop over HTTP, and has a process look up in
the store itself, while the writers of the others are stopped. So each is measured beside the others, round by round.
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

from engine import FeatureStore
from engine.control import writer_answers
from engine.run_directory import read_server_record
from engine.scrubbed import describe_scrub
from perf import servers
from perf.dataset import Dataset, document_keys, random_documents
from perf.report import Finding
from perf.scale import Scale
from perf.stores import copy_of_store, loaded

FEATURES = 50
KEYS = 500
PACES = {"off": 0.0, "24 h": 24.0, "fast": 1e-4}
"""By name, `--scrub-hours`. A period that no disk can keep is scrubbed at the fast pace without end."""
_SETTLING_SECONDS = 60.0


@dataclass(frozen=True)
class _Served:
    """A server at one pace of the scrub, and its store opened in this process."""

    server: servers.Server
    store: Path
    opened: FeatureStore
    writer: int

    def verified_bytes(self) -> int:
        """What its scrub verified so far."""
        document = describe_scrub(self.store)
        return document["bytes_verified"] if document is not None else 0


def run(scale: Scale) -> list[Finding]:
    """Latencies at each pace, against those without a scrub, and how much the fast pace verifies in a second."""
    rows = scale.load_rows if scale.small else scale.load_rows // 2
    data = Dataset(rows, FEATURES)
    # Many short rounds: what else the machine does is to befall all paces alike.
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
        # The progress is noted every few seconds: only the sum of all rounds tells.
        fast_bytes = served["fast"].verified_bytes() - verified_before
        for one in served.values():
            os.kill(one.writer, signal.SIGCONT)
    return [
        *_findings(latencies),
        Finding("scrub", "verified at the fast pace under load", fast_bytes / fast_seconds / 1e6, "MB/s"),
    ]


@contextmanager
def _serving(store: Path, hours: float) -> Iterator[_Served]:
    """A server whose writer is stopped, once the scrub at its start is over."""
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
