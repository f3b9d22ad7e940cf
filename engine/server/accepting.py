"""Take connections from a listening socket that all workers share, so that each worker gets its part of them.

The kernel wakes every worker for a connection and gives it to the first that comes, which tends to be the same one
again and again: of 64 connections made in a row one of two workers took 63, and kept them, being keep-alive. So a
worker that has more connections than another leaves that one a moment to come first. The numbers stand in memory that
the workers share; each writes its own place, and nobody waits for anybody: a worker that hangs costs the others that
moment.

A worker has a limit of connections. When it is reached, the worker closes the connection that has been idle longest to
accept the next. If none is idle, it accepts a few more, answers one request on each, and closes them, so that /health
is answered. Further connections wait in the kernel's queue until others have closed.
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
    """What makes the protocol of a new connection, and counts it out when it is lost."""

    def meet(self, connection: socket.socket, *, is_extra: bool) -> asyncio.BaseProtocol:
        """One that `is_extra` is over the limit, and to be got rid of."""

    def make_room(self, *, at_once: bool) -> bool:
        """Close the connection that has been idle longest; return whether there was one."""


class ConnectionCounts:
    """How many connections each worker has; made before the workers are forked."""

    def __init__(self, workers: int) -> None:
        self._counts = memoryview(mmap.mmap(-1, 4 * workers)).cast("i")

    def __getitem__(self, worker: int) -> int:
        return self._counts[worker]

    def __setitem__(self, worker: int, count: int) -> None:
        self._counts[worker] = count

    def least(self) -> int:
        """The number of connections of the worker that has fewest."""
        return min(self._counts)


class Acceptor:
    """Accepts connections for one worker until `close`.

    Args:
        listener: the shared socket, non-blocking.
        host: takes in each connection.
        counts: where all workers note how many connections they have, and `worker`, this one's place there.
        most: the limit of this worker's connections.
        tls: tells what a new connection is to be made with; None is plain TCP.
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
        # The connections in their TLS handshake, in order of arrival; None for one whose handshake was aborted.
        self._greeting: dict[asyncio.Task[None], socket.socket | None] = {}
        self._waiting: asyncio.TimerHandle | None = None
        counts[worker] = 0  # One that died in this place had some.
        self._listen()

    def close(self) -> None:
        """Accept no more."""
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
            # One at a time, a worker with much to do would leave those that wait here for seconds.
            while self._accept() and self._counts[self._worker] <= min(self._counts.least(), self._most):
                pass

    def _accept_and_listen(self) -> None:
        self._listen()
        self._accept()

    def _accept(self) -> bool:
        """Take one connection if there is one; returns whether there was."""
        try:
            connection, client = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return False  # Another worker was first, or the client has gone.
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
        """Close an idle connection, or else the one whose TLS handshake takes longest; return whether there was one."""
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
                partial(self._host.meet, connection, is_extra=is_extra),
                connection,
                ssl=context,
                ssl_handshake_timeout=patience,
            )
        except OSError as error:
            # The client has gone already, or was sent away: then only this log says why.
            if isinstance(error, ssl.SSLError):
                log.info("no TLS with %s: %s", client, error)
            connection.close()
            self._counts[self._worker] -= 1
