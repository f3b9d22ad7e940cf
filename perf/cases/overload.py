"""Ten times as many requests as a worker can answer: the effect on the accepted and on the rejected requests, on the
worker's memory, and on the requests after the overload.

The requests are large, so that one process can send ten times the worker's capacity on the same cores. The time of an
answer counts from when its request was due, so the client's own delays count too.
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from perf import servers
from perf.cases.arrivals import read_json
from perf.dataset import Dataset, matrix, random_documents
from perf.report import Finding
from perf.scale import Scale
from perf.servers import Server, ask, put_under_load, write_bodies
from perf.stores import loaded

KEYS = 2_000
FEATURES = 50
OVERLOAD = 10
CLOSED_CONNECTIONS = 4
OPEN_CONNECTIONS = 500
TIMEOUT_MS = 100
_MIB = 1 << 20

Load = dict[str, Any]
"""The output of `perf.http_load`."""


@dataclass(frozen=True)
class Round:
    """The worker's capacity in requests per second, and the results of three loads in this order: half the capacity,
    ten times the capacity, and half the capacity again."""

    capacity: float
    before: Load
    overloaded: Load
    after: Load


def run(scale: Scale) -> list[Finding]:
    """Run rounds of half the capacity, ten times the capacity, and half the capacity again without a pause.

    Raises:
        AssertionError: an answer is wrong, or a request was neither answered nor refused.
    """
    data = Dataset(scale.rows, FEATURES)
    documents = random_documents(data, KEYS, 100)
    bodies = scale.directory / "bodies-overload.jsonl"
    first = write_bodies(bodies, data, documents)[0]
    seconds = 0.3 if scale.small else 4.0
    with servers.shoal(loaded(scale.directory, data), timeout_ms=TIMEOUT_MS) as server:
        if not np.array_equal(read_json(ask(server, first)), matrix(documents[0], FEATURES)):
            raise AssertionError("the server answers wrongly")
        rounds = []
        memory = []
        for _ in range(scale.rounds + 1):
            rounds.append(_round(server, bodies, seconds))
            memory.append(sum(worker.memory_full_info().uss for worker in server.workers) / _MIB)
    # The first round warms up and does not count.
    return _findings(rounds[1:], memory[1:])


def _round(server: Server, bodies: Path, seconds: float) -> Round:
    """Measure the worker's capacity, then put it under three loads without a pause between them."""
    closed = put_under_load(server, bodies, count=int(100 * seconds), connections=CLOSED_CONNECTIONS)
    capacity = float(closed.load["requests_per_second"])

    def arriving(share: float) -> Load:
        rate = share * capacity
        outcome = put_under_load(
            server,
            bodies,
            count=int(rate * seconds),
            connections=OPEN_CONNECTIONS,
            rate=rate,
            may_refuse=True,
        )
        return outcome.load

    return Round(capacity, arriving(0.5), arriving(OVERLOAD), arriving(0.5))


def _findings(rounds: list[Round], memory: list[float]) -> list[Finding]:
    case = f"{OVERLOAD}x what one worker can do, {KEYS} x {FEATURES}, JSON"
    answered = [one.overloaded["requests_per_second"] / one.capacity for one in rounds]
    after = [one.after["p99"] / one.before["p99"] for one in rounds]
    p99 = 1e3 * median(one.overloaded["p99"] for one in rounds)
    return [
        Finding(case, "capacity", median(one.capacity for one in rounds), "1/s"),
        Finding(case, "answered / capacity", median(answered), "x"),
        Finding(
            case, "refused", median(one.overloaded["refused"] / one.overloaded["seconds"] for one in rounds), "1/s"
        ),
        Finding(case, "p50 of what is answered", 1e3 * median(one.overloaded["p50"] for one in rounds), "ms"),
        Finding(case, "p99 of what is answered", p99, "ms", at_most=float(TIMEOUT_MS)),
        Finding(case, "client late, p99", 1e3 * median(one.overloaded["late_p99"] for one in rounds), "ms"),
        Finding(case, "p99 at half the load", 1e3 * median(one.before["p99"] for one in rounds), "ms"),
        Finding(case, "p99 at half the load, just after / before", median(after), "x", detail={"ratios": after}),
        Finding(case, "refused of half the load, before", _refused([one.before for one in rounds]), "%"),
        Finding(case, "refused of half the load, just after", _refused([one.after for one in rounds]), "%"),
        Finding(case, "worker's own memory, last round - first", memory[-1] - memory[0], "MiB", at_most=16.0),
    ]


def _refused(loads: list[Load]) -> float:
    """Return the share of refused requests in percent."""
    return 100 * float(median(load["refused"] / (load["refused"] + load["requests"]) for load in loads))
