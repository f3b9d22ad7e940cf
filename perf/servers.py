"""Servers under test, as real processes on ports of their own, and the load that another process puts on them."""

import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import psutil

from engine.run_directory import read_server_record
from perf.dataset import Dataset, document_keys

PEERS = Path(__file__).parent.parent / ".venv-peers" / "bin"
"""The environment of peers whose dependencies do not go with Shoal's; `make bench` installs it."""
START_SECONDS = 120.0


@dataclass(frozen=True)
class Server:
    """A running server: where it listens, and the processes whose CPU is its cost."""

    port: int
    workers: tuple[psutil.Process, ...]

    def scheduled_seconds(self) -> tuple[float, float]:
        """How long its workers' threads have run so far, and how long they could have and had no core, by the
        scheduler's account, in nanoseconds' precision."""
        tasks = [task for process in self.workers for task in Path(f"/proc/{process.pid}/task").iterdir()]
        accounts = [[int(number) for number in (task / "schedstat").read_text().split()] for task in tasks]
        return sum(account[0] for account in accounts) / 1e9, sum(account[1] for account in accounts) / 1e9


@dataclass(frozen=True)
class Outcome:
    """What a load found: `load` as `perf.http_load` prints it, and per request the seconds that the server's workers
    ran and the seconds that they waited for a core."""

    load: dict[str, Any]
    cpu_per_request: float
    wait_per_request: float

    @property
    def seconds_per_request(self) -> float:
        """Wall time of the run per request, over all connections."""
        return float(self.load["seconds"] / self.load["requests"])

    @property
    def client_cpu_per_request(self) -> float:
        """CPU seconds that the load itself cost, on the same cores."""
        return float(self.load["client_cpu_per_request"])


def put_under_load(
    server: Server,
    bodies: Path,
    *,
    count: int,
    path: str = "/v1/lookup",
    accept: str = "application/json",
    connections: int = 1,
    rate: float | None = None,
    arrivals: str = "even",
    may_refuse: bool = False,
) -> Outcome:
    """Send `count` requests from a process of its own: in a closed loop, or `rate` a second, "even" or "poisson".

    Raises:
        AssertionError: a request failed, or was refused though none may be, or none was answered.
    """
    arguments = ["--port", server.port, "--path", path, "--accept", accept, "--bodies", bodies]
    arguments += ["--connections", connections, "--count", count]
    if rate is not None:
        arguments += ["--rate", rate, "--arrivals", arrivals]
    ran_before, waited_before = server.scheduled_seconds()
    run = subprocess.run(
        [sys.executable, "-m", "perf.http_load", *map(str, arguments)], capture_output=True, check=True, text=True
    )
    load = json.loads(run.stdout)
    if load["failures"] or not load["requests"] or (load["refused"] and not may_refuse):
        raise AssertionError(
            f"of {count} requests to port {server.port} {load['failures']} failed and {load['refused']} were refused"
        )
    ran, waited = server.scheduled_seconds()
    return Outcome(load, (ran - ran_before) / load["requests"], (waited - waited_before) / load["requests"])


def write_bodies(path: Path, data: Dataset, requests: Sequence[npt.NDArray[np.int64]]) -> list[bytes]:
    """The bodies of requests for all features of documents, in a file for `put_under_load`."""
    bodies = [
        orjson.dumps({"features": data.references, "entities": {"doc_id": document_keys(documents)}})
        for documents in requests
    ]
    path.write_bytes(b"\n".join(bodies))
    return bodies


@contextmanager
def shoal(
    store: Path,
    *,
    workers: int = 1,
    root: Path | None = None,
    grpc_port: int | None = None,
    log: Path | None = None,
    timeout_ms: int = 600_000,
    scrub_hours: float = 0.0,
    silent_seconds: float | None = None,
) -> Iterator[Server]:
    """`shoal serve` on a store; its log is kept in a file if one is named. What is measured is how long answers take,
    also when that is too long, unless `timeout_ms` says how long is. Without a scrub: that of a new store's first
    minutes is not to be a part of what else is measured."""
    port = free_port()
    command = [sys.executable, "-m", "cli", "serve", "--store", str(store), "--port", str(port)]
    command += ["--request-timeout-ms", str(timeout_ms), "--scrub-hours", str(scrub_hours)]
    command += ["--silent-seconds", str(silent_seconds)] if silent_seconds is not None else []
    command += ["--workers", str(workers)] + (["--from", str(root)] if root else [])
    command += ["--grpc-port", str(grpc_port)] if grpc_port is not None else []
    with _running(command, f"http://127.0.0.1:{port}/ready", log):
        while (record := read_server_record(store)) is None or len(record.workers) < workers:
            time.sleep(0.01)
        yield Server(port, tuple(psutil.Process(pid) for pid in record.workers))


@contextmanager
def floor(body: Path) -> Iterator[Server]:
    """aiohttp, answering the bytes of a file to everything."""
    port = free_port()
    with _running([sys.executable, "-m", "perf.floor", "--port", str(port), "--body", str(body)], port) as process:
        yield Server(port, (psutil.Process(process.pid),))


@contextmanager
def redis(directory: Path) -> Iterator[int]:
    """A Redis server without persistence; yields its port."""
    port = free_port()
    command = ["redis-server", "--port", str(port), "--save", "", "--appendonly", "no", "--dir", str(directory)]
    with _running(command, port):
        yield port


@contextmanager
def feast(repo: Path, options: Sequence[str]) -> Iterator[Server]:
    """Feast's Python feature server with one worker."""
    port = free_port()
    command = [str(PEERS / "feast"), "--chdir", str(repo), "serve", "--port", str(port), "--workers", "1", *options]
    with _running(command, f"http://127.0.0.1:{port}/health") as process:
        children = psutil.Process(process.pid).children(recursive=True)
        yield Server(port, (psutil.Process(process.pid), *children))


@contextmanager
def _running(command: Sequence[str], ready: str | int, log: Path | None = None) -> "Iterator[subprocess.Popen[bytes]]":
    """A process that is ready when a URL answers 200, or a port takes connections; its output is shown if it fails."""
    with log.open("w+b") if log is not None else tempfile.TemporaryFile() as output:
        # Into a file: a server that writes a line a request stops when nobody empties its pipe.
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + START_SECONDS
            while not _answers(ready):
                if process.poll() is not None or time.monotonic() > deadline:
                    output.seek(0)
                    raise RuntimeError(f"{' '.join(command)} did not start: {output.read().decode()[-2000:]}")
                time.sleep(0.05)
            yield process
        finally:
            process.terminate()
            process.wait()


def _answers(ready: str | int) -> bool:
    try:
        if isinstance(ready, int):
            socket.create_connection(("127.0.0.1", ready), timeout=1).close()
            return True
        with urllib.request.urlopen(ready, timeout=1) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(server: Server, body: bytes, *, path: str = "/v1/lookup", accept: str = "application/json") -> bytes:
    """One request's answer."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}{path}", body, {"Accept": accept, "Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        content: bytes = answer.read()
        return content
