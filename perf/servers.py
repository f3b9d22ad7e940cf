"""Start servers under test as real processes on free ports, and put load on them from another process."""

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

from perf.dataset import Dataset, document_keys
from shoal.engine.process.run_directory import read_server_record

PEERS = Path(__file__).parent.parent / ".venv-peers" / "bin"
"""The Python environment of peers with dependencies that conflict with Shoal's; `make bench` installs it."""
START_SECONDS = 120.0


@dataclass(frozen=True)
class Server:
    """A running server: its port, and the processes that count for its CPU time."""

    port: int
    workers: tuple[psutil.Process, ...]

    def scheduled_seconds(self) -> tuple[float, float]:
        """Return two times in seconds: how long the workers' threads have run so far, and how long they have waited for
        a core. The numbers come from the kernel's scheduler and are precise to nanoseconds."""
        tasks = [task for process in self.workers for task in Path(f"/proc/{process.pid}/task").iterdir()]
        accounts = [[int(number) for number in (task / "schedstat").read_text().split()] for task in tasks]
        return sum(account[0] for account in accounts) / 1e9, sum(account[1] for account in accounts) / 1e9


@dataclass(frozen=True)
class Outcome:
    """The result of a load. `load` is the output of `perf.http_load`. `cpu_per_request` is the CPU time of the server's
    workers per request. `wait_per_request` is the time per request for which the workers waited for a core. Both times
    are in seconds."""

    load: dict[str, Any]
    cpu_per_request: float
    wait_per_request: float

    @property
    def seconds_per_request(self) -> float:
        """The wall time of the run in seconds, divided by the number of responses on all connections."""
        return float(self.load["seconds"] / self.load["requests"])

    @property
    def client_cpu_per_request(self) -> float:
        """The CPU seconds per request of the load generator, which runs on the same cores."""
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
    """Send `count` requests from a separate process. Send them in a closed loop, or at `rate` per second with "even" or
    "poisson" arrivals.

    Raises:
        AssertionError: a request failed, a request was refused and `may_refuse` is false, or no request was answered.
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
    """Write a file for `put_under_load` with the body of each request for all features of its documents. Return the
    bodies."""
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
    """Run `shoal serve` on a store. If `log` is given, keep the server's log in that file.

    The default `timeout_ms` is so long that slow answers are measured instead of rejected. By default there is no
    scrub, because the scrub in the first minutes of a new store would affect other measurements.
    """
    port = free_port()
    command = [sys.executable, "-m", "shoal", "serve", "--store", str(store), "--port", str(port)]
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
    """Run an aiohttp server that answers every request with the contents of a file."""
    port = free_port()
    with _running([sys.executable, "-m", "perf.floor", "--port", str(port), "--body", str(body)], port) as process:
        yield Server(port, (psutil.Process(process.pid),))


@contextmanager
def redis(directory: Path) -> Iterator[int]:
    """Run a Redis server without persistence, and yield its port."""
    port = free_port()
    command = ["redis-server", "--port", str(port), "--save", "", "--appendonly", "no", "--dir", str(directory)]
    with _running(command, port):
        yield port


@contextmanager
def feast(repo: Path, options: Sequence[str]) -> Iterator[Server]:
    """Run Feast's Python feature server with one worker."""
    port = free_port()
    command = [str(PEERS / "feast"), "--chdir", str(repo), "serve", "--port", str(port), "--workers", "1", *options]
    with _running(command, f"http://127.0.0.1:{port}/health") as process:
        children = psutil.Process(process.pid).children(recursive=True)
        yield Server(port, (psutil.Process(process.pid), *children))


@contextmanager
def _running(command: Sequence[str], ready: str | int, log: Path | None = None) -> "Iterator[subprocess.Popen[bytes]]":
    """Run a process, and wait until it is ready: until the URL `ready` answers 200, or the port `ready` accepts
    connections. If the process does not start, raise RuntimeError with its output."""
    with log.open("w+b") if log is not None else tempfile.TemporaryFile() as output:
        # The output goes to a file, because a server that logs every request blocks if nobody reads its pipe.
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
    """Return a free TCP port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(server: Server, body: bytes, *, path: str = "/v1/lookup", accept: str = "application/json") -> bytes:
    """Send one request to a server, and return the body of the response."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}{path}", body, {"Accept": accept, "Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        content: bytes = answer.read()
        return content
