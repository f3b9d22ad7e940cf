"""Accept connections from a listening socket that all workers share, and spread them evenly over the workers.

The kernel wakes every worker for a new connection, and gives the connection to the first worker that accepts. That
tends to be the same worker again and again: of 64 connections made in a row, one of two workers took 63. Keep-alive
connections then stay with that worker. So a worker that has more connections than another worker waits for a short time
before it accepts, so that the other worker can accept first. The connection counts are in shared memory. Each worker
writes only its own count, and waits for no other worker. So a hung worker delays the other workers by no more than this
short time.

The number of connections per worker is limited. At the limit, the worker closes the connection that has been idle
longest, and accepts the next connection in its place. If no connection is idle, the worker accepts a few extra
connections, so that /health works. It answers one request on each extra connection, and then closes the connection.
Further connections wait in the kernel's queue until other connections have closed.
"""

import asyncio
import contextlib
import logging
import mmap
import socket
import ssl
from collections.abc import Callable
from functools import partial
from typing import Protocol

log = logging.getLogger("shoal.worker")

_HEAD_START_SECONDS = 0.002
_EXHAUSTED_SECONDS = 0.5
HANDSHAKE_SECONDS = 10.0
_EXTRA_HANDSHAKE_SECONDS = 2.0

EXTRA_CONNECTIONS = 64
_FULL_SECONDS = 0.05


class Host(Protocol):
    """The factory of connection protocols. When a connection is lost, the host also subtracts it from the worker's
    count."""

    def protocol_for(self, connection: socket.socket, *, is_extra: bool) -> asyncio.BaseProtocol:
        """Return the protocol of a new connection. If `is_extra`, the connection is over the limit and soon closed."""

    def make_room(self, *, at_once: bool) -> bool:
        """Close the connection that has been idle longest; return whether any connection was idle."""


class ConnectionCounts:
    """The number of connections of each worker, in shared memory. Create this before the workers are forked."""

    def __init__(self, workers: int) -> None:
        self._counts = memoryview(mmap.mmap(-1, 4 * workers)).cast("i")

    def __getitem__(self, worker: int) -> int:
        return self._counts[worker]

    def __setitem__(self, worker: int, count: int) -> None:
        self._counts[worker] = count

    def least(self) -> int:
        """Return the smallest number of connections of any worker."""
        return min(self._counts)


class Acceptor:
    """The acceptor of one worker's connections, until `close`.

    Args:
        listener: the shared socket, non-blocking.
        host: the factory of the connections' protocols.
        counts: the connection counts of all workers.
        worker: the index of this worker in `counts`.
        most: the maximum number of connections of this worker.
        tls: a function that returns the TLS context for a new connection, or None for plain TCP.
    """

    def __init__(
        self,
        listener: socket.socket,
        host: Host,
        counts: ConnectionCounts,
        worker: int,
        most: int,
        tls: Callable[[], ssl.SSLContext | None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._host = host
        self._counts = counts
        self._worker = worker
        self._most = most
        self._tls = tls
        # The connections in their TLS handshake, in order of arrival; None if the handshake was aborted.
        self._greeting: dict[asyncio.Task[None], socket.socket | None] = {}
        self._waiting: asyncio.TimerHandle | None = None
        counts[worker] = 0  # An earlier worker with this index may have died with open connections.
        self._listen()

    def close(self) -> None:
        """Stop accepting connections."""
        self._loop.remove_reader(self._listener)
        if self._waiting is not None:
            self._waiting.cancel()
        self._listener.close()

    def _listen(self) -> None:
        self._waiting = None
        self._loop.add_reader(self._listener, self._offered)

    def _offered(self) -> None:
        mine = self._counts[self._worker]
        if mine >= self._most + EXTRA_CONNECTIONS and not self._make_room():
            self._pause(_FULL_SECONDS, self._listen)
        elif mine > self._counts.least():
            self._pause(_HEAD_START_SECONDS, self._accept_and_listen)
        else:
            # Accept several per wakeup. With only one per wakeup, a busy worker would let connections wait for seconds.
            while self._accept() and self._counts[self._worker] <= min(self._counts.least(), self._most):
                pass

    def _accept_and_listen(self) -> None:
        self._listen()
        self._accept()

    def _accept(self) -> bool:
        """Accept one connection if one is waiting; return whether it was accepted."""
        try:
            connection, client = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return False  # Another worker was first, or the client has disconnected.
        except OSError as error:
            log.error("connections cannot be accepted: %s", error)
            self._host.make_room(at_once=False)
            self._pause(_EXHAUSTED_SECONDS, self._listen)
            return False
        is_extra = self._counts[self._worker] >= self._most and not self._host.make_room(at_once=False)
        self._counts[self._worker] += 1
        connection.setblocking(False)
        greeting = self._loop.create_task(self._greet(connection, client, is_extra=is_extra))
        self._greeting[greeting] = connection
        greeting.add_done_callback(self._greeting.pop)
        return True

    def _make_room(self) -> bool:
        """Close an idle connection. If no connection is idle, close the one whose TLS handshake has taken longest.
        Return whether a connection was closed."""
        if self._host.make_room(at_once=True):
            return True
        for greeting, connection in self._greeting.items():
            if connection is not None:
                self._greeting[greeting] = None
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
                return True
        return False

    def _pause(self, seconds: float, then: Callable[[], None]) -> None:
        self._loop.remove_reader(self._listener)
        self._waiting = self._loop.call_later(seconds, then)

    async def _greet(self, connection: socket.socket, client: object, *, is_extra: bool) -> None:
        context = self._tls()
        patience = None
        if context is not None:
            patience = _EXTRA_HANDSHAKE_SECONDS if is_extra else HANDSHAKE_SECONDS
        try:
            await self._loop.connect_accepted_socket(
                partial(self._host.protocol_for, connection, is_extra=is_extra),
                connection,
                ssl=context,
                ssl_handshake_timeout=patience,
            )
        except OSError as error:
            # The client disconnected, or its TLS handshake failed. Only this log says why a handshake failed.
            if isinstance(error, ssl.SSLError):
                log.info("TLS handshake with %s failed: %s", client, error)
            connection.close()
            self._counts[self._worker] -= 1
