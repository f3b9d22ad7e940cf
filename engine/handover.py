"""How a server takes the place of the one that serves its store, and no request fails: the socket on which a supervisor
waits for its successor, and the successor's end of it.

    <store>/run/supervisor.sock

Each message is a packet of JSON. The old server begins, and sends along the descriptors of its lock on the store and of
its listening sockets:

    old   {"protocol": 1, "address": …, "sockets": ["lock", "http", "grpc"]}
    new   {"order": "writer"}    its workers answer: the old writer is to stop
    old   {"done": "writer"}     nobody writes now: the new writer may start
    new   {"order": "leave"}     its writer answers too: the old server closes its end, drains, and ends

Since both have the same listening socket, no connection is lost that waits in it. Until the last message the old server
serves on as if nothing were, and does so too if its successor's end of the socket closes: it starts a writer again.
"""

import json
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from engine.control import unix_address
from engine.errors import ReplacementFailed
from engine.run_directory import is_same_file, run_path
from engine.running_clock import RunningClock

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
    """What passes from one server to the next: its address, and the descriptors of its lock on the store, of its
    listening socket for HTTP, and of what holds its port for gRPC."""

    address: str
    lock: int
    http: int
    grpc: int | None


class Succession:
    """The old server's end. Nothing here waits: the supervisor asks several times a second.

    Args:
        inheritance: what a successor gets.

    Raises:
        OSError: the socket cannot be made.
    """

    def __init__(self, store: Path, inheritance: Inheritance) -> None:
        self._path = _socket_path(store)
        self._inheritance = inheritance
        # Whoever has the lock on the store may: what lies there is a dead server's, or that of the one before.
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
        """Whether there is one, that may still fail."""
        return self._successor is not None

    def is_in_place(self) -> bool:
        """Whether the socket's path leads to this server's socket."""
        return self._is_own(self._path)

    def poll(self) -> Order | None:
        """The next order of a successor, if one has come."""
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
        # What the successor waits for; or it has gone.
        self._successor.close()
        self._successor = None
        return "leave" if order == "leave" else None

    def confirm_writer(self) -> None:
        """Tell the successor, once, that nobody writes now; it may have gone meanwhile, which `poll` will show."""
        if self._successor is not None and not self._confirmed:
            self._confirmed = True
            with suppress(OSError):
                self._successor.send(_encoded(done="writer"))

    def close(self) -> None:
        """Wait for no successor any more. The path stays, which may be the successor's by now."""
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
    """The new server's end, from the moment when it has what it inherits; use `find`."""

    def __init__(self, connection: socket.socket, inheritance: Inheritance) -> None:
        self._connection = connection
        self.inheritance = inheritance

    @classmethod
    def find(cls, store: Path, *, patience: float = _ANSWER_SECONDS) -> Self | None:
        """The server that serves a store; None if none does. It may take up to `patience` seconds to answer.

        Raises:
            ReplacementFailed: it cannot be replaced: by its release, or because another server is about to.
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
                    f"the server of {store} hands over by protocol {head.get('protocol')}, this release takes "
                    f"{_PROTOCOL}; stop it first"
                )
        except (OSError, ReplacementFailed) as error:
            connection.close()
            if isinstance(error, ReplacementFailed):
                raise
            raise ReplacementFailed(
                f"the server of {store} does not answer on {_socket_path(store)} ({error or type(error).__name__}): "
                f"another one may be about to take its place; try again, or stop it first"
            ) from error
        connection.setblocking(False)
        passed: Mapping[str, int] = dict(zip(head["sockets"], descriptors, strict=True))
        return cls(connection, Inheritance(head["address"], passed["lock"], passed["http"], passed.get("grpc")))

    def order(self, order: Order) -> None:
        """Tell the old server what to do; it may have gone, which `poll` will show."""
        with suppress(OSError):
            self._connection.send(_encoded(order=order))

    def poll(self) -> Literal["done", "gone"] | None:
        """Whether the last order is carried out, or there is no old server any more."""
        try:
            message = _decoded(self._connection.recv(_MESSAGE_BYTES))
        except BlockingIOError:
            return None
        except OSError:
            return "gone"
        return "done" if "done" in message else "gone"

    def close(self) -> None:
        """Leave the old server: to itself, if it was not told to leave."""
        self._connection.close()


class Takeover:
    """The steps by which a new server comes to be the only one. Nothing here waits either.

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
        """Whether the old server's writer is gone."""
        return self._at in ("writer", "old server")

    def is_over(self, *, workers_answer: bool, writer_answers: Callable[[], bool]) -> bool:
        """Take the next step, if it is time for it; returns whether that was the last one.

        Raises:
            ReplacementFailed: it takes too long.
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
                f"waited {_TAKEOVER_SECONDS:g} s for the {self._at}; the server that was to be replaced goes on"
            )
        return False

    def close(self) -> None:
        """Leave the old server to itself."""
        self._predecessor.close()


def _encoded(**message: Any) -> bytes:
    return json.dumps(message).encode()


def _decoded(data: bytes) -> dict[str, Any]:
    """A message; an empty one where the other end is closed."""
    document: dict[str, Any] = json.loads(data) if data else {}
    return document
