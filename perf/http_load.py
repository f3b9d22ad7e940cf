"""A load generator in a process of its own: `python -m perf.http_load --help`.

Closed loop: each connection sends its next request when it has the answer to the last. Open loop: requests arrive at a
fixed rate whatever the server does, and latency counts from the moment a request was due, so that waiting counts. It
speaks just enough HTTP/1.1 to cost little beside a server, and reports its own CPU.
"""

import asyncio
import json
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import click
import numpy as np
import uvloop


@dataclass
class Tally:
    """What came of the requests so far: seconds each took, and how many failed."""

    latencies: list[float] = field(default_factory=list)
    failures: int = 0
    received: int = 0


class Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request under way."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._buffer = bytearray()
        self._expected = -1
        self._due = 0.0
        self._answered: asyncio.Future[None] | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are asyncio's in all but their class.
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        if self._answered is not None and not self._answered.done():
            self._tally.failures += 1
            self._answered.set_result(None)

    @property
    def is_open(self) -> bool:
        """Whether another request can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    async def ask(self, request: bytes, due: float) -> None:
        """Send a request, due at a moment of the monotonic clock, and wait for the whole answer."""
        assert self._transport is not None
        self._due = due
        self._answered = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        await self._answered

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._expected < 0:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(self._buffer[:end]).lower()
            if not head.startswith(b"http/1.1 200"):
                self._tally.failures += 1
            at = head.index(b"content-length:") + 15
            stop = head.find(b"\r", at)
            self._expected = end + 4 + int(head[at : stop if stop > 0 else None])
        if len(self._buffer) >= self._expected:
            self._tally.latencies.append(time.perf_counter() - self._due)
            self._tally.received += self._expected
            self._buffer.clear()
            self._expected = -1
            if self._answered is not None and not self._answered.done():
                self._answered.set_result(None)


class Load:
    """A server under load from some connections."""

    def __init__(self, host: str, port: int, requests: list[bytes]) -> None:
        self._address = (host, port)
        self._requests = requests
        self._next = 0
        self.tally = Tally()

    async def closed_loop(self, connections: int, count: int) -> None:
        """Send `count` requests over as many connections, each as fast as it is answered."""
        await asyncio.gather(*(self._one_after_the_other(count // connections) for _ in range(connections)))

    async def open_loop(self, connections: int, count: int, rate: float) -> None:
        """Send `count` requests, `rate` a second, each over whichever connection is free first."""
        loop = asyncio.get_running_loop()
        free = deque([await self._connect() for _ in range(connections)])
        waiting: deque[float] = deque()
        tasks: set[asyncio.Task[None]] = set()

        async def send(connection: Connection, due: float) -> None:
            await connection.ask(self._request(), due)
            if not connection.is_open:
                connection = await self._connect()
            if waiting:
                await send(connection, waiting.popleft())
            else:
                free.append(connection)

        started = time.perf_counter()
        for number in range(count):
            due = started + number / rate
            delay = due - time.perf_counter()
            if delay > 0:
                await asyncio.sleep(delay)
            if free:
                task = loop.create_task(send(free.popleft(), due))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            else:
                waiting.append(due)
        while tasks:
            await asyncio.gather(*tasks)

    async def _one_after_the_other(self, count: int) -> None:
        connection = await self._connect()
        for _ in range(count):
            if not connection.is_open:
                connection = await self._connect()
            await connection.ask(self._request(), time.perf_counter())

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: Connection(self.tally), *self._address)
        return connection

    def _request(self) -> bytes:
        self._next += 1
        return self._requests[self._next % len(self._requests)]


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
def main(
    host: str, port: int, path: str, accept: str, bodies: Path, connections: int, count: int, rate: float | None
) -> None:
    """Put a server under load and print what came of it as JSON; latencies in seconds."""
    load = Load(host, port, make_requests(host, path, accept, bodies.read_bytes().splitlines()))
    started, cpu_before = time.perf_counter(), time.process_time()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if rate is None:
            runner.run(load.closed_loop(connections, count))
        else:
            runner.run(load.open_loop(connections, count, rate))
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu_before
    json.dump(_summary(load.tally, seconds, cpu), sys.stdout)


def _summary(tally: Tally, seconds: float, cpu: float) -> dict[str, Any]:
    latencies = np.array(tally.latencies or [np.nan])
    return {
        "requests": len(tally.latencies),
        "failures": tally.failures,
        "seconds": seconds,
        "requests_per_second": len(tally.latencies) / seconds,
        "bytes_received": tally.received,
        "client_cpu_seconds": cpu,
        **{f"p{q:g}": float(np.percentile(latencies, q)) for q in (50, 95, 99, 99.9)},
        "max": float(latencies.max()),
    }


if __name__ == "__main__":
    main()
