"""shoal.client with replicas and with shards, each in its own network namespace: the throughput by the number of
servers, and what the client sees while one server is slow or cut off.

All servers share the cores of this machine, so more servers give more throughput only while cores are free.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from perf.cases.nodes import PORT, RATE, SLOW_KILOBITS, Replica, await_seen, is_ready, serving
from perf.dataset import Dataset
from perf.namespaces import Host, hosts
from perf.report import Finding
from perf.scale import Scale
from perf.stores import published

KEYS, FEATURES = 500, 20
NODES = 3
SLOW_SHARD_KILOBITS = 16_000
"""The rate of the slow shard: 1.5 times the rate that it needs, because no other server can answer in its place."""
_PATIENCE_SECONDS = 300.0


def run(scale: Scale) -> list[Finding]:
    """Measure everything on one root. Every answer is checked."""
    data = Dataset(min(scale.rows, 200_000), FEATURES)
    root = published(scale.directory, data)
    with tempfile.TemporaryDirectory(prefix="nodes-", dir=scale.directory) as temporary, ExitStack() as closing:
        directory = Path(temporary)
        client, *others = closing.enter_context(hosts(1 + NODES))
        replicas = []
        shards = []
        for number, host in enumerate(others, 1):
            replica = Replica(host, directory / f"whole-{number}")
            shard = Replica(host, directory / f"shard-{number}", PORT + 1)
            closing.enter_context(serving(replica, root))
            closing.enter_context(serving(shard, root, "--shard", f"{number}/{NODES}"))
            replicas.append(f"http://{replica.address}")
            shards.append(f"http://{shard.address}")
            for server in (replica, shard):
                await_seen(lambda server=server: is_ready(client, server), "a server that is ready")  # type: ignore[misc]
        asked = _Asked(client, data)
        findings = _throughput(scale, asked, replicas, shards)
        seconds = 3.0 if scale.small else 12.0
        count = int(RATE * seconds)
        for what, slow, options in (
            ("two replicas", SLOW_KILOBITS, _named("--replica", replicas[:2])),
            ("two replicas, hedged", SLOW_KILOBITS, [*_named("--replica", replicas[:2]), "--hedge", "p95"]),
            ("three shards", SLOW_SHARD_KILOBITS, _named("--shard", shards)),
        ):
            faults: dict[str, AbstractContextManager[None]] = {
                "all well": nullcontext(),
                f"one at {slow:,} kbit/s": _slowed(others[0], slow),
                "one cut off": _cut(others[0]),
            }
            for fault, struck in faults.items():
                case = f"client, {what}, {KEYS} x {FEATURES}, {RATE:g} requests/s: {fault}"
                load = asked.start(*options, "--count", count, "--rate", RATE, "--threads", 32, "--timeout", 1.0)
                time.sleep(1.5 + seconds / 3)
                with struck:
                    result = _result(load)
                failed = sum(result["failures"].values())
                findings += [
                    Finding(case, name, 1e3 * (result[name] or 0.0), "ms") for name in ("p50", "p99", "slowest")
                ]
                findings.append(Finding(case, "failed", failed, "requests", detail=result["failures"]))
                time.sleep(2.0)  # From here on, the server that was cut off is reachable again.
    return findings


class _Asked:
    """The client host, which looks up rows of a data set."""

    def __init__(self, host: Host, data: Dataset) -> None:
        self._host = host
        self._data = data

    def start(self, *options: object) -> "subprocess.Popen[bytes]":
        command: list[object] = [sys.executable, "-m", "perf.client_load", "--rows", self._data.rows]
        command += ["--features", FEATURES, "--keys", KEYS, *options]
        return subprocess.Popen(self._host.command(command), stdout=subprocess.PIPE)


def _named(option: str, values: list[str]) -> list[object]:
    return [part for value in values for part in (option, value)]


def _result(load: "subprocess.Popen[bytes]") -> dict[str, Any]:
    output, _ = load.communicate(timeout=_PATIENCE_SECONDS)
    assert load.returncode == 0
    result: dict[str, Any] = json.loads(output)
    return result


@contextmanager
def _slowed(host: Host, kilobits: int) -> Iterator[None]:
    host.slow(kilobits)
    try:
        yield
    finally:
        host.hasten()


@contextmanager
def _cut(host: Host) -> Iterator[None]:
    host.cut()
    try:
        yield
    finally:
        host.join()


def _throughput(scale: Scale, asked: _Asked, replicas: list[str], shards: list[str]) -> list[Finding]:
    ways: dict[str, Callable[[], list[object]]] = {
        f"{count} replicas": lambda count=count: _named("--replica", replicas[:count])  # type: ignore[misc]
        for count in range(1, NODES + 1)
    }
    ways[f"{NODES} shards"] = lambda: _named("--shard", shards)
    seen: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(scale.rounds):
        # In turn, so that other work on the machine affects all of them equally.
        for name, way in ways.items():
            result = _result(asked.start(*way(), "--count", max(100, scale.requests), "--threads", 4))
            assert not result["failures"], result
            seen[name].append(result["requests_per_second"])
    case = f"client, {KEYS} x {FEATURES}, npy, four threads in a closed loop"
    return [Finding(case, name, statistics.median(rates), "1/s") for name, rates in seen.items()]
