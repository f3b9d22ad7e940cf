"""Latency in an open loop, where requests arrive at a given rate, whatever the server does. The rate is 60% of the
capacity of two workers, or rises from 10% of the capacity to more than the capacity.

The capacity is the rate of answers on eight connections that send requests without a pause. In this measurement, too,
the client and the workers share the machine's cores, so the client's work lowers the capacity.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt
import orjson

from perf import servers
from perf.cases import http
from perf.cases.http import Form
from perf.dataset import Dataset, matrix, random_documents
from perf.report import Finding
from perf.scale import Scale
from perf.servers import Server, ask, put_under_load, write_bodies
from perf.stores import loaded

KEYS = 100
FEATURES = 20
WORKERS = 2
CLOSED_CONNECTIONS = 8
OPEN_CONNECTIONS = 32
PERCENTILES = ("p50", "p95", "p99")
SHARES = (0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1, 1.2)

Point = dict[str, float]
"""The results at one arrival rate. The rate is a share of the capacity. Rates are per second, times in milliseconds."""


def read_json(body: bytes) -> npt.NDArray[np.float32]:
    """Return float32[keys, features] from a JSON response."""
    return np.array(list(orjson.loads(body)["features"].values()), np.float32).T


FORMS: Mapping[str, Form] = {
    "JSON": Form("/v1/lookup", "application/json", read_json),
    "npy": http.FORMS["npy"],
}


def run(scale: Scale) -> list[Finding]:
    """Measure the latency at 60% of the capacity of two workers."""
    findings = []
    for arrivals in ("even", "poisson"):
        for name, points in _measure(scale, (0.6,), seconds=3.0, arrivals=arrivals).items():
            case = f"HTTP, {KEYS} x {FEATURES}, {name}, {arrivals} arrivals at 60% of two workers"
            findings += _findings(case, points[0], held=arrivals == "even")
    return findings


def _findings(case: str, point: Point, *, held: bool) -> list[Finding]:
    return [
        Finding(case, "requests/s", point["requests_per_second"], "1/s"),
        Finding(case, "p50", point["p50"], "ms"),
        Finding(case, "p95", point["p95"], "ms", at_most=10.0 if held else None),
        Finding(case, "p99", point["p99"], "ms"),
        Finding(case, "p99 / p50", point["p99_of_p50"], "x", at_most=4.0 if held else None, detail=point),
        Finding(case, "CPU a request", point["cpu"], "ms"),
        Finding(case, "workers' wait for a core a request", point["wait"], "ms"),
        Finding(case, "client CPU a request", point["client_cpu"], "ms"),
        Finding(case, "client late, p99", point["client_late_p99"], "ms"),
    ]


def run_rising(scale: Scale) -> list[Finding]:
    """Measure the latency from 10% to 120% of the capacity of two workers."""
    findings = []
    for name, points in _measure(scale, SHARES, seconds=2.0).items():
        case = f"HTTP, {KEYS} x {FEATURES}, {name}, even arrivals, rising"
        curve = [{"x": point["requests_per_second"]} | {name: point[name] for name in PERCENTILES} for point in points]
        detail = {"points": curve, "x": "requests/s", "unit": "ms", "loads": points}
        findings.append(Finding(case, "capacity", points[0]["capacity"], "1/s", detail=detail))
        findings += [Finding(case, f"p99 at {point['share']:.0%} of it", point["p99"], "ms") for point in points]
        findings.append(Finding(case, "client CPU a request", median(point["client_cpu"] for point in points), "ms"))
    return findings


def _measure(
    scale: Scale, shares: Sequence[float], *, seconds: float, arrivals: str = "even"
) -> dict[str, list[Point]]:
    """Return the points of each format, one point per share. A point has the medians over the rounds. The first round
    warms up and does not count."""
    data = Dataset(scale.rows, FEATURES)
    requests = random_documents(data, KEYS, 500)
    bodies = scale.directory / "bodies-arrivals.jsonl"
    first = write_bodies(bodies, data, requests)[0]
    sweeps: dict[str, list[list[Point]]] = {name: [] for name in FORMS}
    with servers.shoal(loaded(scale.directory, data), workers=WORKERS) as server:
        for name, form in FORMS.items():
            if not np.array_equal(form.read(ask(server, first, accept=form.accept)), matrix(requests[0], FEATURES)):
                raise AssertionError(f"{name} answers wrongly")
        for number in range(scale.rounds + 1):
            for name, form in FORMS.items():
                sweep = _sweep(server, bodies, form.accept, shares, 0.1 if scale.small else seconds, arrivals)
                if number:
                    sweeps[name].append(sweep)
    return {name: [_typical(points) for points in zip(*of_form, strict=True)] for name, of_form in sweeps.items()}


def _sweep(
    server: Server, bodies: Path, accept: str, shares: Sequence[float], seconds: float, arrivals: str
) -> list[Point]:
    # The rate is not known yet, so this is only an estimate of the number of requests that take `seconds`.
    count = int(4_000 * seconds)
    closed = put_under_load(server, bodies, count=count, accept=accept, connections=CLOSED_CONNECTIONS)
    capacity = closed.load["requests_per_second"]
    points = []
    for share in shares:
        rate = share * capacity
        outcome = put_under_load(
            server,
            bodies,
            count=max(10, int(rate * seconds)),
            accept=accept,
            connections=OPEN_CONNECTIONS,
            rate=rate,
            arrivals=arrivals,
        )
        load = outcome.load
        points.append(
            {
                "share": share,
                "capacity": capacity,
                "requests_per_second": load["requests_per_second"],
                **{name: 1e3 * load[name] for name in PERCENTILES},
                "p99_of_p50": load["p99"] / load["p50"],
                "cpu": 1e3 * outcome.cpu_per_request,
                "wait": 1e3 * outcome.wait_per_request,
                "client_cpu": 1e3 * outcome.client_cpu_per_request,
                "client_late_p99": 1e3 * load["late_p99"],
            }
        )
    return points


def _typical(points: Sequence[Point]) -> Point:
    return {name: median(point[name] for point in points) for name in points[0]}
