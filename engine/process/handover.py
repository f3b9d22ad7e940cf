"""The handover: a new server replaces the running server of a store, and no request fails.

The running supervisor waits for its successor on a socket. This module has both ends of that socket:

    <store>/run/supervisor.sock

Each message is a packet of JSON. The old server begins. With its first message it sends the descriptors of its lock on
the store and of its listening sockets:

    old   {"protocol": 1, "address": …, "sockets": ["lock", "http", "grpc"]}
    new   {"order": "writer"}    the new workers answer: the old writer must stop
    old   {"done": "writer"}     nobody writes now: the new writer may start
    new   {"order": "leave"}     the new writer answers too: the old server closes its end, drains, and exits

Both servers have the same listening socket, so no waiting connection is lost. Until the last message, the old server
keeps serving. If the new server closes its end of the socket early, the old server starts a writer again and keeps
serving.
"""

import json
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from shoal.engine.base.errors import ReplacementFailed
from shoal.engine.process.control import unix_address
from shoal.engine.process.run_directory import is_same_file, run_path
from shoal.engine.process.running_clock import RunningClock

_PROTOCOL = 1
_MESSAGE_BYTES = 4096
_MOST_SOCKETS = 8
_ANSWER_SECONDS = 10.0
_TAKEOVER_SECONDS = 60.0

Order = Literal["writer", "leave"]


def _socket_path(store: Path) -> Path:
    return run_path(store) / "supervisor.sock"


@dataclass(frozen=True)
class Inheritance:
    """The state that one server passes to the next: the address and three descriptors. The descriptors are those of the
    lock on the store, of the listening socket for HTTP, and of the socket that reserves the port for gRPC."""

    address: str
    lock: int
    http: int
    grpc: int | None


class Succession:
    """The old server's end of the handover. No method blocks: the supervisor calls `poll` several times a second.

    Args:
        inheritance: the state that a successor receives.

    Raises:
        OSError: the socket cannot be created.
    """

    def __init__(self, store: Path, inheritance: Inheritance) -> None:
        self._path = _socket_path(store)
        self._inheritance = inheritance
        # This server has the lock on the store. So a socket at the path belongs to a dead server, or to the server that
        # this server has replaced.
        self._path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        os.fchmod(self._listener.fileno(), 0o600)
        with unix_address(self._path) as address:
            self._listener.bind(address)
        self._is_own = is_same_file(self._path)
        self._listener.listen()
        self._listener.setblocking(False)
        self._successor: socket.socket | None = None
        self._confirmed = False

    @property
    def has_successor(self) -> bool:
        """Whether a successor is connected. The successor may still fail."""
        return self._successor is not None

    def is_in_place(self) -> bool:
        """Return whether the socket's path leads to this server's socket."""
        return self._is_own(self._path)

    def poll(self) -> Order | None:
        """Return the successor's next order; None if there is no order yet."""
        if self._successor is None:
            self._greet()
        if self._successor is None:
            return None
        try:
            message = _decoded(self._successor.recv(_MESSAGE_BYTES))
        except BlockingIOError:
            return None
        except OSError:
            message = {}
        order = message.get("order")
        if order == "writer":
            return "writer"
        # After "leave" the successor waits until the socket closes. Any other message means that the successor is gone.
        self._successor.close()
        self._successor = None
        return "leave" if order == "leave" else None

    def confirm_writer(self) -> None:
        """Tell the successor, once, that nobody writes now. If the successor is gone, `poll` will notice."""
        if self._successor is not None and not self._confirmed:
            self._confirmed = True
            with suppress(OSError):
                self._successor.send(_encoded(done="writer"))

    def close(self) -> None:
        """Stop waiting for a successor. Keep the file at the socket's path, because the file may be the successor's
        socket by now."""
        self._listener.close()
        if self._successor is not None:
            self._successor.close()

    def _greet(self) -> None:
        try:
            self._successor, _ = self._listener.accept()
        except BlockingIOError:
            return
        passed = {name: fd for name, fd in vars(self._inheritance).items() if isinstance(fd, int)}
        self._confirmed = False
        self._successor.setblocking(False)
        with suppress(OSError):
            head = _encoded(protocol=_PROTOCOL, address=self._inheritance.address, sockets=list(passed))
            socket.send_fds(self._successor, [head], list(passed.values()))


class Predecessor:
    """The new server's end of the handover, after the new server has received its inheritance. Use `find` to make an
    instance."""

    def __init__(self, connection: socket.socket, inheritance: Inheritance) -> None:
        self._connection = connection
        self.inheritance = inheritance

    @classmethod
    def find(cls, store: Path, *, patience: float = _ANSWER_SECONDS) -> Self | None:
        """Return the server that serves a store; None if no server does. That server has `patience` seconds to answer.

        Raises:
            ReplacementFailed: the server cannot be replaced: its release uses another protocol, or another server may
                be about to replace it.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.settimeout(patience)
        try:
            with unix_address(_socket_path(store)) as address:
                connection.connect(address)
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            return None
        try:
            data, descriptors, _, _ = socket.recv_fds(connection, _MESSAGE_BYTES, _MOST_SOCKETS)
            head = _decoded(data)
            if head.get("protocol") != _PROTOCOL:
                raise ReplacementFailed(
                    f"the server of {store} uses handover protocol {head.get('protocol')}, but this release uses "
                    f"{_PROTOCOL}; stop that server first"
                )
        except (OSError, ReplacementFailed) as error:
            connection.close()
            if isinstance(error, ReplacementFailed):
                raise
            raise ReplacementFailed(
                f"the server of {store} does not answer on {_socket_path(store)} ({error or type(error).__name__}): "
                f"another server may be about to replace it; try again, or stop it first"
            ) from error
        connection.setblocking(False)
        passed: Mapping[str, int] = dict(zip(head["sockets"], descriptors, strict=True))
        return cls(connection, Inheritance(head["address"], passed["lock"], passed["http"], passed.get("grpc")))

    def order(self, order: Order) -> None:
        """Send an order to the old server. If the old server is gone, `poll` will notice."""
        with suppress(OSError):
            self._connection.send(_encoded(order=order))

    def poll(self) -> Literal["done", "gone"] | None:
        """Return "done" if the last order was carried out, "gone" if the old server is gone, and None otherwise."""
        try:
            message = _decoded(self._connection.recv(_MESSAGE_BYTES))
        except BlockingIOError:
            return None
        except OSError:
            return "gone"
        return "done" if "done" in message else "gone"

    def close(self) -> None:
        """Close the connection. The old server keeps serving unless it received the order "leave"."""
        self._connection.close()


class Takeover:
    """The steps with which a new server replaces the old one. No method blocks.

    Args:
        with_writer: whether the new server has a writer.
    """

    def __init__(self, predecessor: Predecessor, *, with_writer: bool) -> None:
        self._predecessor = predecessor
        self._with_writer = with_writer
        self._at: Literal["workers", "old writer", "writer", "old server"] = "workers"
        self._clock = RunningClock()

    @property
    def may_write(self) -> bool:
        """Whether the new writer may start, because the old server's writer is gone."""
        return self._at in ("writer", "old server")

    def is_over(self, *, workers_answer: bool, writer_answers: Callable[[], bool]) -> bool:
        """Take the next step if it is due; return whether the takeover is complete.

        Raises:
            ReplacementFailed: the takeover takes too long.
        """
        heard = self._predecessor.poll()
        if heard == "gone":
            return True
        if self._at == "workers" and workers_answer:
            self._predecessor.order("writer")
            self._at = "old writer"
        elif self._at == "old writer" and heard == "done":
            self._at = "writer"
        elif self._at == "writer" and (not self._with_writer or writer_answers()):
            self._predecessor.order("leave")
            self._at = "old server"
        if self._clock.now() > _TAKEOVER_SECONDS:
            raise ReplacementFailed(
                f"waited {_TAKEOVER_SECONDS:g} s for the {self._at}; the old server continues to serve"
            )
        return False

    def close(self) -> None:
        """Close the connection to the old server."""
        self._predecessor.close()


def _encoded(**message: Any) -> bytes:
    return json.dumps(message).encode()


def _decoded(data: bytes) -> dict[str, Any]:
    """Return a message; return an empty message if the other end is closed."""
    document: dict[str, Any] = json.loads(data) if data else {}
    return document
