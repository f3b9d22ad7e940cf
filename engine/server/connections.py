"""A worker's connections: how long what came over them waited, and an end to those whose client does not go on.

A worker answers one request after the other, so that under too much load requests wait, most of them in their
sockets, where no event loop sees them. The kernel knows when each socket last took in a packet, and tells for half a
microsecond.
"""

import math
import socket
import struct
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from engine.server.accepting import ConnectionCounts
from engine.server.admission import Admission
from engine.server.responses import answer_error

_TCP_INFO = getattr(socket, "TCP_INFO", None)
"""Linux alone has it in this form: tcpi_last_data_recv, milliseconds, stands at byte 52 of struct tcp_info."""
_LAST_RECEIVED = struct.Struct("=52xI")
_TCP_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_EXTRA_SECONDS = 1.0

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class Connection(web.RequestHandler):
    """One connection.

    `is_extra` is one over the limit: it is answered once and closed, so that health can be asked for, and others hear
    that there are too many. `patience` is how many seconds a client may take to send the head of a request.
    """

    __slots__ = ("_admission", "_ahead", "_arrived", "_began", "_came", "_patience", "_socket", "is_extra")

    def __init__(
        self,
        manager: web.Server,
        connection: socket.socket,
        admission: Admission,
        *,
        is_extra: bool,
        patience: float,
        **options: Any,
    ) -> None:
        super().__init__(manager, **options)
        self.is_extra = is_extra
        self._admission = admission
        # How many requests are to be answered before the one that was read; None where none waits.
        self._ahead: int | None = None
        self._patience = _EXTRA_SECONDS if is_extra else patience
        # When the last bytes were read, and when they reached this machine, as far as the kernel tells.
        self._came = self._arrived = time.perf_counter()
        # When a head began to come: 0 between requests, and never during one, whose body has a limit of its own. Who is
        # one too many is not to stay without asking something either.
        self._began = self._came if is_extra else 0.0
        self._socket = connection if _TCP_INFO is not None and connection.family in _TCP_FAMILIES else None

    def data_received(self, data: bytes) -> None:
        """What the event loop calls with what it read."""
        if not data:  # aiohttp calls this itself, to go on.
            super().data_received(data)
            return
        self._came = time.perf_counter()
        self._arrived = self._came - self._waited_in_socket()
        if not self._began:
            self._admission.meet()
            if self._refuses(data):
                return
            self._began = self._came
        super().data_received(data)
        request = self._current_request
        if request is not None and self._messages and not request.content.is_eof():
            # All that can follow a body that has not ended is aiohttp's note that it cannot be unpacked, of which who
            # reads the body would not hear.
            self._messages.clear()
            request.content.set_exception(web.RequestPayloadError("it is not packed as it says"))
            self.close()
        if self._messages and self._ahead is None and self._began < math.inf:
            self._ahead = self._admission.take()

    def _refuses(self, data: bytes) -> bool:
        """Whether this is a request for which there is no time, which so is answered already."""
        waited = self._came - self._arrived
        if not self._admission.is_late_when_read(waited, self._admission.timeout):
            return False
        if self.transport is None or self.transport.get_write_buffer_size() or not self._is_idle():
            return False
        answer = self._admission.refusal(data, waited)
        if answer is None:
            return False
        self.transport.write(answer)
        return True

    def _is_idle(self) -> bool:
        waiter = self._waiter
        return not (self.is_extra or self._messages or self._close or self._force_close) and (
            waiter is not None and not waiter.done()
        )

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What aiohttp answers where there is no request to be handled: what came is no HTTP, or is packed in a way
        that is not known here. That is the client's fault, and no news for the log."""
        if status >= web.HTTPInternalServerError.status_code or request.writer.output_size:
            return super().handle_error(request, status, exc, message)
        answer = answer_error("HTTPBadRequest", message or "the request is no HTTP", status)
        answer.force_close()
        return answer

    def log_exception(self, *args: Any, **options: Any) -> None:
        """What aiohttp does about an exception: here nothing, if what came of a client made it."""
        if not isinstance(options.get("exc_info"), web.RequestPayloadError):
            super().log_exception(*args, **options)

    def connection_lost(self, exc: BaseException | None) -> None:
        """What the event loop calls at the end."""
        if self._ahead is not None:
            self._admission.drop()
            self._ahead = None
        super().connection_lost(exc)

    def begin_request(self) -> None:
        """A head is complete, and its turn has come."""
        self._began = math.inf
        if self._ahead is not None:
            self._admission.begin(self._ahead, self._came, self._arrived, time.perf_counter())
            self._ahead = None

    def end_request(self) -> None:
        """It is answered."""
        self._began = 0.0
        # By then the event loop has looked at all sockets once more.
        self._loop.call_soon(self._admission.note_idle, self._admission.met)

    def waited(self) -> float:
        """For how many seconds the last that came of the client has been here."""
        return time.perf_counter() - self._arrived

    def _waited_in_socket(self) -> float:
        # The kernel counts in steps of some milliseconds.
        if self._socket is None or _TCP_INFO is None:
            return 0.0
        try:
            account = self._socket.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _LAST_RECEIVED.size)
            milliseconds: int = _LAST_RECEIVED.unpack(account)[0]
        except (OSError, struct.error):  # The client has gone, or the kernel is not one that says so much.
            return 0.0
        return milliseconds / 1e3

    def is_overdue(self, now: float) -> bool:
        """Whether a head has been coming for too long."""
        return self._began > 0 and now - self._began > self._patience


class ConnectionServer(web.Server):
    """aiohttp's low-level server, with a count of its worker's connections that goes down as soon as one is lost: its
    own list of them keeps each for a while."""

    def __init__(
        self,
        handler: Handler,
        admission: Admission,
        counts: ConnectionCounts,
        worker: int,
        *,
        patience: float,
        **options: Any,
    ) -> None:
        super().__init__(handler, **options)
        self._admission = admission
        self._counts = counts
        self._worker = worker
        self._patience = patience
        # What is left of a body that nobody reads any more is waited for no longer than for one that is read.
        self._options = options | {"lingering_time": min(10.0, patience)}
        self._options.pop("request_factory", None)

    def meet(self, connection: socket.socket, *, is_extra: bool) -> Connection:
        """The protocol of a new connection."""
        if hasattr(socket, "TCP_USER_TIMEOUT") and connection.family in _TCP_FAMILIES:
            # Ends who does not take an answer, which is in memory until it is taken.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, math.ceil(1e3 * self._patience))
        return Connection(
            self,
            connection,
            self._admission,
            is_extra=is_extra,
            patience=self._patience,
            loop=self._loop,
            **self._options,
        )

    def connection_lost(self, handler: web.RequestHandler, exc: BaseException | None = None) -> None:
        """What aiohttp calls once for each connection that was made."""
        super().connection_lost(handler, exc)
        self._counts[self._worker] -= 1

    def end_overdue(self) -> int:
        """End the connections whose client takes too long for the head of a request; returns how many."""
        now, ended = time.perf_counter(), 0
        for connection in self.connections:
            if isinstance(connection, Connection) and connection.connected and connection.is_overdue(now):
                connection.force_close()
                ended += 1
        return ended
