"""A load generator in a process of its own: `python -m perf.http_load --help`.

Closed loop: each connection sends its next request when it has the answer to the last. Open loop: requests arrive at a
given rate whatever the server does, and latency counts from the moment a request was due, so that waiting counts. It
speaks just enough HTTP/1.1 to cost little beside a server, and reports its own CPU, and how late it was itself. It does
without NumPy, whose threads keep a core busy for a tenth of a second after the import.
"""

import gc
import json
import re
import select
import signal
import socket
import sys
import time
from array import array
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate, chain
from math import ceil
from pathlib import Path
from random import Random
from threading import Event
from typing import Any

import click

_PART_BYTES = 1 << 16
"""Read at once: little enough that malloc gives the same memory again, which is in the cache."""
_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CLOSES = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)


@dataclass
class Tally:
    """What came of the requests.

    In seconds: of each answer, how long after its request was due it came, and that moment of `perf_counter`; of each
    request for which a connection was free, how late it was sent, which is the generator's own fault; and the time and
    CPU that all took together. What is `refused` with 503 is neither an answer nor a failure.
    """

    latencies: list[float] = field(default_factory=list)
    due: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    failures: int = 0
    refused: int = 0
    received: int = 0
    seconds: float = 0.0
    cpu: float = 0.0


class Connection:
    """One keep-alive connection with at most one request under way. `select` takes it as it is."""

    def __init__(self, address: tuple[str, int], tally: Tally) -> None:
        self._address = address
        self._tally = tally
        self._due = 0.0
        self._open()

    def _open(self) -> None:
        self._socket = socket.create_connection(self._address)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.fileno = self._socket.fileno
        self._begin()

    def _begin(self) -> None:
        self._head = b""
        self._missing: int | None = None
        self.free_since = time.perf_counter()

    def send(self, request: bytes, due: float) -> None:
        """Send a request that was due at a moment of `perf_counter`."""
        self._due = due
        # A server that has closed the connection shows when the answer is read.
        with suppress(OSError):
            self._socket.sendall(request)

    def receive(self) -> bool:
        """Take what has come, waiting for it if nothing has; returns whether this request is done with."""
        try:
            data = self._socket.recv(_PART_BYTES)
        except OSError:
            data = b""
        if not data:
            return self._fail()
        if self._missing is not None:
            self._missing -= len(data)
        else:
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                return False
            length = _CONTENT_LENGTH.search(self._head, 0, end)
            if length is None or not self._head.startswith((b"HTTP/1.1 200", b"HTTP/1.1 503")):
                return self._fail()
            size = end + 4 + int(length[1])
            self._tally.received += size
            self._missing = size - len(self._head)
            self._head = self._head[:end]
        if self._missing > 0:
            return False
        if self._missing < 0:
            return self._fail()
        closes, is_refused = _CLOSES.search(self._head), self._head.startswith(b"HTTP/1.1 503")
        self._begin()
        if is_refused:
            self._tally.refused += 1
        else:
            self._tally.latencies.append(self.free_since - self._due)
            self._tally.due.append(self._due)
        if closes:
            self._reopen()
        return True

    def close(self) -> None:
        """Leave the server."""
        self._socket.close()

    def _fail(self) -> bool:
        self._tally.failures += 1
        self._reopen()
        return True

    def _reopen(self) -> None:
        self.close()
        self._open()


def drive(
    address: tuple[str, int],
    requests: Sequence[bytes],
    connections: int,
    count: int,
    arrivals: Sequence[float] | None = None,
    enough: Event | None = None,
) -> Tally:
    """Send `count` requests, those given in turn, each over the connection that has been free for longest; fewer if
    there are `enough`.

    Args:
        arrivals: when each is due, in seconds from the start; None for as soon as a connection is free.
    """
    tally = Tally()
    free = deque(Connection(address, tally) for _ in range(connections))
    busy: set[Connection] = set()
    sent = 0
    cpu_before = time.process_time()
    started = now = time.perf_counter()
    while sent < count or busy:
        if enough is not None and enough.is_set():
            count = sent
            if not busy:
                break
        wait = None
        while free and sent < count:
            due = now if arrivals is None else started + arrivals[sent]
            if due > now:
                wait = due - now
                break
            connection = free.popleft()
            if connection.free_since <= due:
                tally.late.append(now - due)
            connection.send(requests[sent % len(requests)], due)
            busy.add(connection)
            sent += 1
            now = time.perf_counter()
        # epoll and poll wait for whole milliseconds, select does not. Where there is but one thing to wait for, reading
        # it does.
        for connection in [*busy] if len(busy) == 1 and wait is None else select.select(busy, (), (), wait)[0]:
            if connection.receive():
                busy.remove(connection)
                free.append(connection)
        now = time.perf_counter()
    tally.seconds, tally.cpu = now - started, time.process_time() - cpu_before
    for connection in free:
        connection.close()
    return tally


def arrival_times(arrivals: str, count: int, rate: float) -> list[float]:
    """When `count` requests are due, in seconds from the start: evenly, or as independent clients send them."""
    if arrivals == "even":
        return [number / rate for number in range(count)]
    random = Random(7)
    return list(accumulate(random.expovariate(rate) for _ in range(count)))


def make_requests(host: str, path: str, accept: str, bodies: list[bytes]) -> list[bytes]:
    """Whole POST requests, ready to be sent."""
    return [
        b"POST %s HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\nAccept: %s\r\nContent-Length: %d\r\n\r\n%s"
        % (path.encode(), host.encode(), accept.encode(), len(body), body)
        for body in bodies
    ]


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=int, required=True)
@click.option("--path", default="/v1/lookup", show_default=True)
@click.option("--accept", default="application/json", show_default=True)
@click.option("--bodies", type=click.Path(path_type=Path), required=True, help="A file with a request body a line.")
@click.option("--connections", default=1, show_default=True)
@click.option("--count", default=1000, show_default=True, help="How many requests.")
@click.option("--rate", type=float, help="Open loop: requests a second. Without it, closed loop.")
@click.option(
    "--arrivals",
    type=click.Choice(["even", "poisson"]),
    default="even",
    show_default=True,
    help="Open loop: at even distances, or at random as from many clients.",
)
@click.option(
    "--each",
    type=click.Path(path_type=Path),
    help="Write of each answer when it was due and how long it took, two float64, to this file.",
)
def main(
    host: str,
    port: int,
    path: str,
    accept: str,
    bodies: Path,
    connections: int,
    count: int,
    rate: float | None,
    arrivals: str,
    each: Path | None,
) -> None:
    """Put a server under load and print what came of it as JSON; latencies in seconds. SIGTERM ends it early."""
    requests = make_requests(host, path, accept, bodies.read_bytes().splitlines())
    times = arrival_times(arrivals, count, rate) if rate is not None else None
    # By default the kernel may end a wait 50 µs late, so as to end several at once.
    Path("/proc/self/timerslack_ns").write_text("1")
    # Nothing here makes cycles, and a pause would count as the server's latency.
    gc.disable()
    enough = Event()
    signal.signal(signal.SIGTERM, lambda *_: enough.set())
    tally = drive((host, port), requests, connections, count, times, enough)
    if each is not None:
        pairs = zip(tally.due, tally.latencies, strict=True)
        each.write_bytes(array("d", chain.from_iterable(pairs)).tobytes())
    json.dump(_summary(tally), sys.stdout)


def _summary(tally: Tally) -> dict[str, Any]:
    return {
        "requests": len(tally.latencies),
        "failures": tally.failures,
        "refused": tally.refused,
        "seconds": tally.seconds,
        "requests_per_second": len(tally.latencies) / tally.seconds,
        "bytes_received": tally.received,
        "client_cpu_seconds": tally.cpu,
        "client_cpu_per_request": tally.cpu / max(1, len(tally.latencies)),
        **{f"p{percent:g}": _percentile(tally.latencies, percent) for percent in (50, 95, 99, 99.9)},
        "max": max(tally.latencies, default=None),
        "late_p99": _percentile(tally.late, 99),
    }


def _percentile(seconds: list[float], percent: float) -> float | None:
    """What so many percent of the times do not exceed; None of none."""
    return sorted(seconds)[max(0, ceil(len(seconds) * percent / 100) - 1)] if seconds else None


if __name__ == "__main__":
    main()
