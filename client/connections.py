"""Connections of the synchronous client: sockets that are kept for the next request, and the responses on them.

A request is written in one piece, so that a small request travels in one packet. http.client parses the responses. The
client waits on several sockets at once, and closes the socket of a response that it no longer needs.
"""

import errno
import http.client
import io
import os
import select
import socket
import ssl
from collections import deque
from collections.abc import Mapping
from time import monotonic
from typing import Any

from shoal.client.addresses import Address
from shoal.client.calls import Unreached
from shoal.client.wire import READ_HEADERS, Request, Response

FAILURES = (OSError, http.client.HTTPException)
"""The exceptions of a failed connection."""

Place = tuple[int, Any]
"""An address family, and an address in the form that sockets accept."""

_KEPT = 64
_MOST_AT_ONCE = 1 << 20


class Exchange:
    """A request to a server: it connects, sends the request, and then waits for the answer.

    `connect_until` is the deadline of the connection; None once the request was sent. Before that, wait for the socket
    to become writable. After that, wait for the socket to become readable.
    """

    def __init__(self, pool: "ConnectionPool", method: str, data: bytes) -> None:
        self._pool = pool
        self._method = method
        self._data = data
        self._connection: socket.socket
        self._places: deque[Place] = deque()
        self.connect_until: float | None = None

    def begin(self, deadline: float) -> None:
        """Send the request over a kept connection, or begin to connect; raise the errors of `go_on`."""
        connection = self._pool.take()
        if connection is not None:
            self._connection = connection
            self._send(deadline)
            return
        try:
            self._places.extend(self._pool.places())
        except (OSError, UnicodeError) as error:
            raise Unreached(str(error)) from error
        self._connect(deadline, OSError("the host has no address"))

    def go_on(self, deadline: float, *, is_ready: bool) -> None:
        """Send the request if the connection is made, or try the host's next address.

        Args:
            is_ready: whether the socket became writable; if not, the connect timeout has passed.

        Raises:
            Unreached: no connection to the server was made.
            OSError: the connection ended, or the deadline passed.
        """
        number = self._connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if is_ready else errno.ETIMEDOUT
        if number:
            self._connection.close()
            self._connect(deadline, OSError(number, os.strerror(number)))
            return
        try:
            self._connection = self._pool.secured(self._connection, deadline)
        except OSError as error:
            self._connection.close()
            raise Unreached(str(error) or type(error).__name__) from error
        self._send(deadline)

    def _connect(self, deadline: float, failure: OSError) -> None:
        """Begin to connect to the next of the host's addresses; if no address is left, raise the last failure."""
        while self._places:
            family, place = self._places.popleft()
            self._connection = socket.socket(family)
            self._connection.setblocking(False)
            try:
                self._connection.connect(place)
            except BlockingIOError as error:
                if error.errno == errno.EINPROGRESS:
                    break
                failure = error
            except OSError as error:
                failure = error
            else:
                break
            self._connection.close()
        else:
            raise Unreached(str(failure)) from failure
        self.connect_until = min(monotonic() + self._pool.connect_timeout, deadline)

    def _send(self, deadline: float) -> None:
        self.connect_until = None
        try:
            unsent = memoryview(self._data)
            while unsent:
                # Do not use `sendall`: over TLS it would apply the timeout to each TLS record separately.
                self._connection.settimeout(_remaining(deadline))
                unsent = unsent[self._connection.send(unsent) :]
        except BaseException:
            self._connection.close()
            raise

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._connection.fileno()

    def receive(self, deadline: float) -> Response:
        """Read the response. Keep the connection for the next request if the response permits that.

        Raises:
            OSError, http.client.HTTPException: the connection failed, or `deadline` passed.
        """
        try:
            incoming: Any = _Incoming(self._connection, deadline)
            answer = http.client.HTTPResponse(incoming, method=self._method)
            answer.begin()
            pieces = []
            while piece := answer.read1(_MOST_AT_ONCE):
                pieces.append(piece)
            if answer.length:
                raise http.client.IncompleteRead(b"".join(pieces), answer.length)
        except BaseException:
            self.cancel()
            raise
        headers = {name: value for name in READ_HEADERS if (value := answer.headers.get(name)) is not None}
        keep = not answer.will_close
        answer.close()
        if keep:
            self._pool.give_back(self._connection)
        else:
            self.cancel()
        return Response(answer.status, headers, b"".join(pieces), self._pool.address.text)

    def cancel(self) -> None:
        """Close the connection, and ignore any response."""
        self._connection.close()


class _Incoming(io.RawIOBase):
    """The bytes that arrive on a connection until a deadline.

    A socket's timeout starts again at each read. So each read gets the time until the deadline as its timeout. This
    includes http.client's reads of headers and chunk sizes.
    """

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self._connection = connection
        self._deadline = deadline

    def makefile(self, _mode: str) -> io.BufferedReader:
        """Return the file from which http.client reads."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._connection.settimeout(_remaining(self._deadline))
        return self._connection.recv_into(buffer)


class ConnectionPool:
    """Connections to one server; it may be used from several threads."""

    def __init__(self, address: Address, tls: ssl.SSLContext | None, connect_timeout: float) -> None:
        self.address = address
        self.connect_timeout = connect_timeout
        self._tls = (tls or ssl.create_default_context()) if address.tls else None
        # Appending to a deque and popping from it are atomic, so threads need no lock.
        self._idle: deque[socket.socket] = deque()
        self._is_closed = False

    def send(self, request: Request, headers: Mapping[str, str], deadline: float) -> Exchange:
        """Send a request, or begin to connect for it.

        Raises:
            Unreached: no connection to the server was made.
            OSError: the connection ended, or the deadline passed.
        """
        exchange = Exchange(self, request.method, self._head(request, headers) + request.body)
        exchange.begin(deadline)
        return exchange

    def places(self) -> list[Place]:
        """Return the addresses of the server. For a host name, these are all addresses from the system's resolver."""
        address = self.address
        if address.path is not None:
            return [(socket.AF_UNIX, address.path)]
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        return [(family, place) for family, _, _, _, place in found]

    def secured(self, connection: socket.socket, deadline: float) -> socket.socket:
        """Return a connection over a connected socket, with TLS if the address says so."""
        if self.address.path is None:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._tls is None:
            return connection
        connection.settimeout(min(self.connect_timeout, _remaining(deadline)))
        return self._tls.wrap_socket(connection, server_hostname=self.address.host)

    def give_back(self, connection: socket.socket) -> None:
        """Keep a connection for the next request."""
        if len(self._idle) < _KEPT:
            self._idle.append(connection)
        else:
            connection.close()
        if self._is_closed:
            self.close()

    def close(self) -> None:
        """Close all connections: idle ones now, others when their answer has arrived."""
        self._is_closed = True
        while True:
            try:
                self._idle.pop().close()
            except IndexError:
                return

    def take(self) -> socket.socket | None:
        """Return the most recently used connection that the server has not closed; None if there is none."""
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                return None
            poll = select.poll()
            poll.register(connection, select.POLLIN)
            if not poll.poll(0):
                return connection
            connection.close()

    def _head(self, request: Request, headers: Mapping[str, str]) -> bytes:
        lines = [f"{request.method} {request.path} HTTP/1.1", f"Host: {self.address.host_header}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if request.method != "GET":
            lines.append(f"Content-Length: {len(request.body)}")
        head = "\r\n".join(lines)
        return f"{head}\r\n\r\n".encode("latin-1")


def _remaining(deadline: float) -> float:
    remaining = deadline - monotonic()
    if remaining <= 0:
        raise TimeoutError("the deadline passed")
    return remaining
