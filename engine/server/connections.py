"""A worker's connections: measure how long requests have waited, and close connections with slow clients.

A worker answers one request after the other. So under overload, requests wait. Most of them wait in their sockets,
where the event loop does not see them. The kernel knows when each socket last received a packet, and reading that time
takes half a microsecond.
"""

import math
import socket
import struct
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import ContentEncodingError

from shoal.engine.server.accepting import ConnectionCounts
from shoal.engine.server.admission import Admission
from shoal.engine.server.outgoing import Outgoing
from shoal.engine.server.requests import unsupported
from shoal.engine.server.responses import error_response

_TCP_INFO = getattr(socket, "TCP_INFO", None)
"""The socket option for struct tcp_info. Only Linux has this form of the struct: tcpi_last_data_recv, in milliseconds,
is at byte 52."""
_LAST_RECEIVED = struct.Struct("=52xI")
_TCP_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_EXTRA_SECONDS = 1.0
_SPARED_SECONDS = 5.0
"""A connection that has been idle for less than this time is not closed to make room, because its client may be about
to send a request."""

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class Connection(web.RequestHandler):
    """One connection.

    If `is_extra`, the connection is over the limit. It gets one answer and is then closed. On such a connection /health
    works, and other requests get an error. `patience` is the time in seconds that a client has to send its first byte,
    or the headers of a request. aiohttp's `keepalive_timeout` limits how long the connection may be idle after an
    answer.
    """

    __slots__ = (
        "_admission",
        "_ahead",
        "_arrived",
        "_began",
        "_came",
        "_ended",
        "_has_asked",
        "_has_finished",
        "_outgoing",
        "_patience",
        "_socket",
        "_unsent",
        "_unsent_since",
        "is_extra",
    )

    def __init__(
        self,
        manager: web.Server,
        connection: socket.socket,
        admission: Admission,
        outgoing: Outgoing,
        *,
        is_extra: bool,
        patience: float,
        **options: Any,
    ) -> None:
        super().__init__(manager, **options)
        self.is_extra = is_extra
        self._admission = admission
        self._outgoing = outgoing
        # The number of bytes of an answer that the client has not read, and the time when it stopped reading.
        self._unsent = 0
        self._unsent_since = 0.0
        # The number of requests ahead of the request that was read; None if no request waits.
        self._ahead: int | None = None
        self._patience = _EXTRA_SECONDS if is_extra else patience
        # The time when the last bytes were read, the time when they reached this machine according to the kernel, and
        # the time of the last answer.
        self._came = self._arrived = self._ended = time.perf_counter()
        # The time when the headers of a request began to arrive; 0 between requests, infinity while a request is
        # answered. The body of a request has its own time limit.
        self._began = 0.0
        self._has_asked = self._has_finished = False
        self._socket = connection if _TCP_INFO is not None and connection.family in _TCP_FAMILIES else None

    def data_received(self, data: bytes) -> None:
        """Handle received bytes. Called by the event loop."""
        if not data:  # aiohttp itself calls this with no data, to continue parsing.
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
            # After an unfinished body, the only possible message is aiohttp's error that the body cannot be unpacked.
            # The reader of the body would not see that error, so pass it on.
            self._messages.clear()
            request.content.set_exception(web.RequestPayloadError("it does not match its Content-Encoding"))
            self.close()
        if self._messages and self._ahead is None and self._began < math.inf:
            self._ahead = self._admission.take()

    def _refuses(self, data: bytes) -> bool:
        """Reject a request if its deadline cannot be met; return whether the request was rejected. If it was, its
        answer is already written."""
        waited = self._came - self._arrived
        if not self._admission.is_late_when_read(waited, self._admission.timeout):
            return False
        if self.transport is None or self.transport.get_write_buffer_size() or not self._is_idle():
            return False
        answer = self._admission.refusal(data, waited)
        if answer is None:
            return False
        self._has_asked = True
        self._ended = self._came
        self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
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
        """Return the answer to bytes that are not a valid HTTP request, or have an unknown Content-Encoding. The client
        is at fault, so the error is not logged."""
        if status >= web.HTTPInternalServerError.status_code or request.writer.output_size:
            return super().handle_error(request, status, exc, message)
        if isinstance(exc, ContentEncodingError):
            # aiohttp knows this encoding, but the package that unpacks it is not installed.
            answer = error_response("EncodingUnsupported", unsupported("one that the server cannot unpack"), 415)
        else:
            answer = error_response("HTTPBadRequest", message or "the request is not valid HTTP", status)
        answer.force_close()
        return answer

    def log_exception(self, *args: Any, **options: Any) -> None:
        """Log an exception, unless the client caused it with a body that cannot be read. Called by aiohttp."""
        if not isinstance(options.get("exc_info"), web.RequestPayloadError):
            super().log_exception(*args, **options)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Release what the connection holds. Called by the event loop when the connection is lost."""
        if self._ahead is not None:
            self._admission.drop()
            self._ahead = None
        self._take_unsent()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Count the unsent bytes. Called by the event loop when the client reads an answer too slowly."""
        super().pause_writing()
        if self.transport is not None:
            self._unsent = self.transport.get_write_buffer_size()
            self._unsent_since = time.perf_counter()
            self._outgoing.hold(self._unsent)

    def resume_writing(self) -> None:
        """Subtract the unsent bytes. Called by the event loop once the client has read the answer."""
        self._take_unsent()
        super().resume_writing()

    def _take_unsent(self) -> None:
        self._outgoing.release(self._unsent)
        self._unsent = 0

    def eof_received(self) -> bool:  # type: ignore[override]
        """Return whether the connection stays open until all its requests are answered. Called by the event loop when
        the client has closed its sending side. TLS does not support half-closed connections."""
        waiter = self._waiter
        request = self._current_request
        if (waiter is not None and not waiter.done()) or self.ssl_context is not None:
            return False
        if request is None and not self._messages and not self._began:
            return False  # The answer is being sent; the connection closes after that.
        bodies = [payload for _, payload in self._messages] + ([request.content] if request is not None else [])
        self._has_finished = all(body.is_eof() for body in bodies)
        return self._has_finished

    def begin_request(self) -> None:
        """Note that a request begins: its head is complete, and its turn has come."""
        self._has_asked = True
        self._began = math.inf
        if self._ahead is not None:
            self._admission.begin(self._ahead, self._came, self._arrived, time.perf_counter())
            self._ahead = None

    def end_request(self) -> None:
        """Note that a request is answered."""
        self._ended = time.perf_counter()
        # The next request may have arrived already.
        self._began = self._ended if self._messages else 0.0
        # When the event loop calls `note_idle`, it has polled all sockets once more.
        self._loop.call_soon(self._admission.note_idle, self._admission.met)
        if self._has_finished and not self._messages:
            self.close()

    def waited(self) -> float:
        """Return the seconds since the last bytes from the client reached this machine."""
        return time.perf_counter() - self._arrived

    def _waited_in_socket(self) -> float:
        # The kernel's value has a resolution of some milliseconds.
        if self._socket is None or _TCP_INFO is None:
            return 0.0
        try:
            account = self._socket.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _LAST_RECEIVED.size)
            milliseconds: int = _LAST_RECEIVED.unpack(account)[0]
        except (OSError, struct.error):  # The client has disconnected, or the kernel lacks this field.
            return 0.0
        return milliseconds / 1e3

    def is_overdue(self, now: float) -> bool:
        """Return whether the client takes too long to send its first byte, or the rest of a request's head."""
        if self._request_in_progress:
            return False
        if self._began:
            return now - self._began > self._patience
        return not self._has_asked and now - self._ended > self._patience

    def takes_too_long(self, now: float) -> bool:
        """Return whether the client takes too long to read its answer."""
        return self._unsent > 0 and now - self._unsent_since > self._patience

    def idle_seconds(self, now: float) -> float:
        """Return how many seconds this connection has been without a complete request; 0 while a request is being
        answered."""
        if self._request_in_progress or self._messages or self._began == math.inf:
            return 0.0
        return now - (self._began or self._ended)

    def end(self) -> None:
        """Close at once, without waiting for the client's TLS close_notify."""
        if self.transport is not None:
            self.transport.abort()
        self.force_close()

    @property
    def has_asked(self) -> bool:
        """Whether a request has ever arrived."""
        return self._has_asked


class ConnectionServer(web.Server):
    """aiohttp's low-level server. It reduces its worker's connection count as soon as a connection is lost, because
    aiohttp keeps lost connections in its own list for a while."""

    def __init__(
        self,
        handler: Handler,
        admission: Admission,
        outgoing: Outgoing,
        counts: ConnectionCounts,
        worker: int,
        *,
        patience: float,
        **options: Any,
    ) -> None:
        super().__init__(handler, **options)
        self._admission = admission
        self._outgoing = outgoing
        self._counts = counts
        self._worker = worker
        self._closed_idle = 0
        self._patience = patience
        # The rest of a body that is no longer read gets no more time than a body that is read.
        self._options = options | {"lingering_time": min(10.0, patience)}
        self._options.pop("request_factory", None)

    def protocol_for(self, connection: socket.socket, *, is_extra: bool) -> Connection:
        """Return the protocol of a new connection."""
        if hasattr(socket, "TCP_USER_TIMEOUT") and connection.family in _TCP_FAMILIES:
            # Let the kernel close the connection if the client stops reading, because an unread answer occupies memory.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, math.ceil(1e3 * self._patience))
        return Connection(
            self,
            connection,
            self._admission,
            self._outgoing,
            is_extra=is_extra,
            patience=self._patience,
            loop=self._loop,
            **self._options,
        )

    def connection_lost(self, handler: web.RequestHandler, exc: BaseException | None = None) -> None:
        """Reduce the connection count by one. Called by aiohttp once for each connection, when the connection is
        lost."""
        super().connection_lost(handler, exc)
        self._counts[self._worker] -= 1

    def make_room(self, *, at_once: bool) -> bool:
        """Close the connection that has been idle longest, but prefer connections that never sent a request. Return
        whether a connection was closed. Connections that became idle a moment ago are closed only if `at_once` is
        true."""
        now = time.perf_counter()
        spared = 0.0 if at_once else _SPARED_SECONDS
        idle = [
            (not connection.has_asked, seconds, connection)
            for connection in self._connected()
            if (seconds := connection.idle_seconds(now)) > spared
        ]
        if not idle:
            return False
        max(idle, key=lambda found: found[:2])[2].end()
        self._closed_idle += 1
        return True

    def take_closed_idle(self) -> int:
        """Return how many connections were closed to make room since the last call."""
        closed = self._closed_idle
        self._closed_idle = 0
        return closed

    def end_overdue(self) -> int:
        """Close connections whose client takes too long to send its first byte or the headers of a request. While
        memory is short, also close connections whose client takes too long to read an answer. Return the number of
        closed connections."""
        now = time.perf_counter()
        ended = 0
        is_short = self._outgoing.is_short
        for connection in self._connected():
            if connection.is_overdue(now) or (is_short and connection.takes_too_long(now)):
                connection.end()
                ended += 1
        return ended

    def _connected(self) -> list[Connection]:
        return [found for found in self.connections if isinstance(found, Connection) and found.connected]
