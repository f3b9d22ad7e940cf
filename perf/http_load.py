"""A load generator in a separate process: `python -m perf.http_load --help`.

In a closed loop, each connection sends its next request after it received the last response. In an open loop, requests
are due at a given rate, whatever the server does. Latency counts from the time at which a request was due, so that the
time in which the request waited counts too.

The generator implements only a small part of HTTP/1.1, so that it takes little CPU from the server. It reports its own
CPU time and its own delays. It does not import NumPy, because NumPy's threads keep a core busy for a tenth of a second
after the import.
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
"""The greatest number of bytes to read at once. For such a small size, malloc always returns the same memory, so this
memory stays in the CPU cache."""
_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CLOSES = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)


@dataclass
class Tally:
    """The results of the requests. All times are in seconds.

    For each response, `due` has the time at which its request was due, by `perf_counter`, and `latencies` has the time
    from then until the response. For each request that found a free connection, `late` has the delay with which the
    generator sent it. `seconds` and `cpu` are the wall time and the CPU time of the whole load. `received` is in bytes.
    Requests that were `refused` with 503 count neither as responses nor as failures.
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
    """A keep-alive connection with at most one request in progress. It has a `fileno`, so that `select` accepts it."""

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
        """Send a request that was due at the time `due` of `perf_counter`."""
        self._due = due
        # If the server has closed the connection, reading the response will fail.
        with suppress(OSError):
            self._socket.sendall(request)

    def receive(self) -> bool:
        """Read from the connection once, and block until there is something to read. Return whether the request is
        finished."""
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
        closes = _CLOSES.search(self._head)
        is_refused = self._head.startswith(b"HTTP/1.1 503")
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
        """Close the connection."""
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
    """Send `count` requests, taken in turn from `requests`. Send each over the connection that has been free for
    longest.

    Args:
        arrivals: the due time of each request in seconds from the start; None to send as soon as a connection is free.
        enough: ends the load early when it is set.
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
        # epoll and poll wait for whole milliseconds, but select is more exact. If only one connection is busy, and no
        # request is due, a blocking read replaces select.
        for connection in [*busy] if len(busy) == 1 and wait is None else select.select(busy, (), (), wait)[0]:
            if connection.receive():
                busy.remove(connection)
                free.append(connection)
        now = time.perf_counter()
    tally.seconds = now - started
    tally.cpu = time.process_time() - cpu_before
    for connection in free:
        connection.close()
    return tally


def arrival_times(arrivals: str, count: int, rate: float) -> list[float]:
    """Return the due times of `count` requests in seconds from the start. The times have even intervals, or random
    intervals like those of independent clients."""
    if arrivals == "even":
        return [number / rate for number in range(count)]
    random = Random(7)
    return list(accumulate(random.expovariate(rate) for _ in range(count)))


def make_requests(host: str, path: str, accept: str, bodies: list[bytes]) -> list[bytes]:
    """Return complete POST requests as bytes, one per body."""
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
    """Put a server under load and print the results as JSON, with latencies in seconds. SIGTERM ends the load early."""
    requests = make_requests(host, path, accept, bodies.read_bytes().splitlines())
    times = arrival_times(arrivals, count, rate) if rate is not None else None
    # By default, the kernel may end a wait up to 50 µs late, so that it can end several waits at once.
    Path("/proc/self/timerslack_ns").write_text("1")
    # This process creates no reference cycles, so it needs no garbage collection. A collection would add to the
    # measured latency of the server.
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
    """Return a percentile of some times in seconds; None if there are no times."""
    return sorted(seconds)[max(0, ceil(len(seconds) * percent / 100) - 1)] if seconds else None


if __name__ == "__main__":
    main()
