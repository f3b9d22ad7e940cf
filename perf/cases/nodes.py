"""Replicas of one root, each in its own network namespace. The case measures the throughput of one, two and more
replicas, what clients see through HAProxy while one replica is slow or cut off, and the skew between replicas while
deltas arrive.

All replicas share the cores of this machine, so more replicas give more throughput only while cores are free.
"""

import json
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from perf.dataset import Dataset, distinct_documents, matrix, publish_delta, random_documents
from perf.namespaces import Host, hosts
from perf.report import Finding
from perf.scale import Scale
from perf.servers import write_bodies
from perf.stores import copy_of_root, published
from shoal import FeatureStore
from shoal.engine.root.export_root import ExportRoot

KEYS, FEATURES = 100, 20
REPLICAS = 3
PORT = 8080
RATE = 100.0
"""The rate of requests through HAProxy, per second. This rate is far below the machine's capacity, so that only the
fault has an effect."""
CHANGED = 1_000
SLOW_KILOBITS = 1_000
_HAPROXY = Path(__file__).parents[2] / "deploy" / "haproxy.cfg"
_PATIENCE_SECONDS = 120.0
_LATE_SECONDS = 0.1


@dataclass(frozen=True)
class Replica:
    """A server with one worker on its own host, which follows the root."""

    host: Host
    store: Path
    port: int = PORT

    @property
    def address(self) -> str:
        """The address of the server as HOST:PORT."""
        return f"{self.host.address}:{self.port}"


@dataclass(frozen=True)
class _Fault:
    """A fault of one of two replicas. `is_noticed` says whether HAProxy must take the replica out of rotation."""

    what: str
    begin: Callable[[], None]
    end: Callable[[], None]
    is_noticed: bool = False


def run(scale: Scale) -> list[Finding]:
    """Measure everything on one root.

    Raises:
        AssertionError: an answer is wrong.
    """
    data = Dataset(min(scale.rows, 200_000), FEATURES)
    bodies = scale.directory / "bodies-nodes.jsonl"
    documents = random_documents(data, KEYS, 50)
    first = write_bodies(bodies, data, documents)[0]
    with tempfile.TemporaryDirectory(prefix="nodes-", dir=scale.directory) as temporary, ExitStack() as closing:
        directory = Path(temporary)
        root = copy_of_root(published(scale.directory, data), directory / "root")
        client, proxy, *others = closing.enter_context(hosts(2 + REPLICAS))
        replicas = []
        started = time.monotonic()
        for number, host in enumerate(others):
            replica = Replica(host, directory / f"store-{number}")
            closing.enter_context(serving(replica, root))
            replicas.append(replica)
        for replica in replicas:
            await_seen(lambda replica=replica: is_ready(client, replica), "a replica that is ready")  # type: ignore[misc]
            _check(client, replica, first, documents[0])
        ready_after = time.monotonic() - started
        findings = [Finding("nodes", f"{REPLICAS} replicas, from nothing to ready together", ready_after, "s")]
        findings += _throughput(scale, client, replicas, bodies)
        findings += _behind_proxy(scale, client, proxy, replicas, bodies, directory)
        findings += _skew(scale, replicas, root, data)
    return findings


# --- servers and loads -------------------------------------------------------------------------------------------


@contextmanager
def serving(replica: Replica, root: ExportRoot, *options: str) -> Iterator[None]:
    """Run `shoal serve` on the replica's host."""
    command: list[object] = [sys.executable, "-m", "shoal", "serve", "--store", replica.store, "--from", root]
    command += ["--host", "0.0.0.0", "--port", replica.port, "--open-to-all", "--workers", 1]
    # The timeout is long, so that late answers are measured and not rejected.
    command += ["--request-timeout-ms", 60_000, *options]
    with replica.store.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(replica.host.command(command), stdout=log, stderr=log)
    try:
        yield
    finally:
        process.terminate()
        process.wait(_PATIENCE_SECONDS)


def _ask(client: Host, url: str, body: bytes | None = None, accept: str = "*/*") -> bytes | None:
    """Request a URL from a host, and return the body; None if the request fails or is answered with an error status."""
    command = ["curl", "-sf", "--max-time", "2", "-H", f"Accept: {accept}", url]
    command += ["--data-binary", "@-"] if body is not None else []
    done = subprocess.run(client.command(command), input=body, capture_output=True, check=False)
    return done.stdout if done.returncode == 0 else None


def is_ready(client: Host, replica: Replica) -> bool:
    """Return whether a replica reports to a host that it is ready."""
    return _ask(client, f"http://{replica.address}/ready") is not None


def _check(client: Host, replica: Replica, body: bytes, documents: Any) -> None:
    answer = _ask(client, f"http://{replica.address}/v1/lookup", body, "application/x-npy")
    assert answer is not None
    header = 10 + int.from_bytes(answer[8:10], "little")
    found = np.frombuffer(answer[header:], np.float32).reshape(KEYS, FEATURES)
    assert np.array_equal(found, matrix(documents, FEATURES)), f"{replica.address} answers wrongly"


def _load(client: Host, address: str, bodies: Path, *options: object) -> "subprocess.Popen[bytes]":
    host, _, port = address.partition(":")
    command: list[object] = [sys.executable, "-m", "perf.http_load", "--host", host, "--port", port, "--bodies", bodies]
    return subprocess.Popen(
        client.command([*command, "--accept", "application/x-npy", *options]), stdout=subprocess.PIPE
    )


def _result(load: "subprocess.Popen[bytes]") -> dict[str, Any]:
    output, _ = load.communicate(timeout=_PATIENCE_SECONDS)
    assert load.returncode == 0
    result: dict[str, Any] = json.loads(output)
    return result


def await_seen(look: Callable[[], object], what: str) -> float:
    """Wait until `look` returns a true value, and return the seconds. Raise AssertionError after two minutes."""
    started = time.monotonic()
    while not look():
        assert time.monotonic() < started + _PATIENCE_SECONDS, f"not seen in {_PATIENCE_SECONDS:g} s: {what}"
        time.sleep(0.02)
    return time.monotonic() - started


# --- throughput --------------------------------------------------------------------------------------------------


def _throughput(scale: Scale, client: Host, replicas: Sequence[Replica], bodies: Path) -> list[Finding]:
    case = f"nodes: {KEYS} x {FEATURES}, npy, a closed loop of 2 connections a replica"
    by_count: dict[int, list[float]] = {count: [] for count in range(1, len(replicas) + 1)}
    for _ in range(scale.rounds):
        # In turn, so that other work on the machine affects all counts equally.
        for count, seen in by_count.items():
            options = ("--connections", 2, "--count", max(50, scale.requests))
            loads = [_load(client, replica.address, bodies, *options) for replica in replicas[:count]]
            results = [_result(load) for load in loads]
            assert not any(result["failures"] or result["refused"] for result in results)
            seen.append(sum(result["requests_per_second"] for result in results))
    return [Finding(case, f"{count} replicas", statistics.median(seen), "1/s") for count, seen in by_count.items()]


# --- one of two is slow, or cut off ------------------------------------------------------------------------------


def _behind_proxy(
    scale: Scale, client: Host, proxy: Host, replicas: Sequence[Replica], bodies: Path, directory: Path
) -> list[Finding]:
    seconds = 3.0 if scale.small else 12.0
    victim = replicas[0]
    stats = directory / "haproxy.sock"
    more = directory / "stats.cfg"
    more.write_text(f"global\n    stats socket {stats} mode 600\n")
    environment = {"SHOAL_1": replicas[0].address, "SHOAL_2": replicas[1].address, "SHOAL_LISTEN": ":8080"}
    command = proxy.command(["env", *(f"{name}={value}" for name, value in environment.items())])
    command += ["haproxy", "-f", str(_HAPROXY), "-f", str(more)]
    address = f"{proxy.address}:{PORT}"
    findings = []
    with _process(command, directory / "haproxy.log"):
        await_seen(lambda: _is_up(stats, "one") and _is_up(stats, "two"), "two replicas that HAProxy asks")
        await_seen(lambda: _ask(client, f"http://{address}/health") is not None, "an answer by the proxy")
        findings += _faced(client, address, bodies, seconds, "all is well")[0]
        faults = (
            _Fault(
                f"one of two sends {SLOW_KILOBITS} kbit/s", lambda: victim.host.slow(SLOW_KILOBITS), victim.host.hasten
            ),
            _Fault("one of two is cut off", victim.host.cut, victim.host.join, is_noticed=True),
        )
        for fault in faults:
            out_after: list[float] = []

            def strike(fault: _Fault = fault, out_after: list[float] = out_after) -> None:
                fault.begin()
                if fault.is_noticed:
                    out_after.append(await_seen(lambda: not _is_up(stats, "one"), "HAProxy does without it"))

            found, last_late = _faced(client, address, bodies, seconds, fault.what, strike)
            fault.end()
            back_after = await_seen(lambda: _is_up(stats, "one"), "it is back")
            case = f"nodes: {fault.what}"
            findings += found
            findings += [Finding(case, "out of rotation after", after, "s") for after in out_after]
            findings.append(Finding(case, f"last answer later than {1e3 * _LATE_SECONDS:g} ms, after", last_late, "s"))
            findings.append(Finding(case, "back in rotation after", back_after, "s"))
    return findings


def _faced(
    client: Host, address: str, bodies: Path, seconds: float, what: str, strike: Callable[[], None] | None = None
) -> tuple[list[Finding], float]:
    """Send requests at an even rate, and cause the fault with `strike` after a third of the time. Return the findings,
    and the seconds from the fault to the due time of the last late request."""
    with tempfile.NamedTemporaryFile() as each:
        options = ("--rate", RATE, "--connections", 64, "--count", int(RATE * seconds), "--each", each.name)
        load = _load(client, address, bodies, *options)
        time.sleep(1.0 + seconds / 3)
        struck = time.perf_counter()
        if strike is not None:
            strike()
        result = _result(load)
        pairs = array("d", Path(each.name).read_bytes())
    due = np.array(pairs[::2])
    latency = np.array(pairs[1::2])
    late = due[(latency > _LATE_SECONDS) & (due > struck)]
    case = f"nodes: {what}"
    return [
        Finding(case, "p50", 1e3 * result["p50"], "ms"),
        Finding(case, "p99", 1e3 * result["p99"], "ms"),
        Finding(case, "slowest", 1e3 * result["max"], "ms"),
        Finding(case, "failed or refused", result["failures"] + result["refused"], "requests", at_most=0),
    ], float(late.max() - struck) if late.size else 0.0


@contextmanager
def _process(command: Sequence[str], log: Path) -> Iterator[None]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        yield
    finally:
        process.terminate()
        process.wait(_PATIENCE_SECONDS)


def _is_up(stats: Path, server: str) -> bool:
    """Return whether HAProxy sends lookups to a server."""
    with socket.socket(socket.AF_UNIX) as asked:
        try:
            asked.connect(str(stats))
        except OSError:
            return False
        asked.sendall(b"show stat\n")
        lines = b"".join(iter(lambda: asked.recv(1 << 16), b"")).decode().splitlines()
    status = lines[0].lstrip("# ").split(",").index("status")
    found = [line.split(",")[status] for line in lines if line.startswith(f"lookups,{server},")]
    return bool(found) and found[0].startswith("UP")


# --- how far apart they are --------------------------------------------------------------------------------------


def _skew(scale: Scale, replicas: Sequence[Replica], root: ExportRoot, data: Dataset) -> list[Finding]:
    """Measure the skew: publish a delta every second, and read the applied entry of each replica every 5 ms."""
    readers = [FeatureStore.open(replica.store) for replica in replicas]
    stop = threading.Event()
    published_at = dict[int, float]()
    samples: list[int] = []
    served: dict[int, float] = {}

    def watch() -> None:
        while not stop.wait(0.005):
            seen = [reader.version().view(data.view).record.applied_seq for reader in readers]
            samples.append(max(seen) - min(seen))
            now = time.perf_counter()
            for seq in [seq for seq in [*published_at] if seq not in served and seq <= min(seen)]:
                served[seq] = now - published_at[seq]

    watching = threading.Thread(target=watch)
    watching.start()
    for change in range(1, (4 if scale.small else 30) + 1):
        due = time.perf_counter() + 1.0
        manifest = publish_delta(root, data, distinct_documents(data, CHANGED, seed=change), change)
        published_at[manifest.seq] = time.perf_counter()
        time.sleep(max(0.0, due - time.perf_counter()))
    await_seen(lambda: served.keys() == published_at.keys(), "the last delta, at all replicas")
    stop.set()
    watching.join()
    case = f"nodes: a delta of {CHANGED:,} rows a second, {len(replicas)} replicas"
    return [
        Finding(case, "skew, most", max(samples), "entries", at_most=1),
        Finding(case, "time in which replicas differ", 100 * float(np.mean(np.array(samples) > 0)), "%"),
        Finding(case, "published to served by all, p50", float(np.percentile([*served.values()], 50)), "s"),
        Finding(case, "published to served by all, p99", float(np.percentile([*served.values()], 99)), "s"),
    ]
