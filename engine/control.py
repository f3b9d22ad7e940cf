"""The writer's control socket: where it is, how to bind it, and the client that asks the writer for something.

    POST /reload   {"view": str | null, "snapshot": str | null, "accept_schema_change": bool}  ->  {"views": [...]}
    GET  /status   ->  a document about the writer

An error is answered with its `http_status` and {"error": {"code": name of its class, "message": str}}, the same form in
which the worker answers its own clients.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from engine import errors
from engine.errors import AddressUnusable, ShoalError, WriterUnavailable

_MAX_ADDRESS_BYTES = 107
_BACKLOG = 1024
_RELOAD_SECONDS = 3600
_STATUS_SECONDS = 10


def writer_socket_path(store: Path) -> Path:
    """Where the writer of a store listens."""
    return store / "run" / "writer.sock"


def error_document(error: ShoalError) -> dict[str, Any]:
    """The JSON form of an error."""
    return {"error": {"code": type(error).__name__, "message": str(error)}}


@contextmanager
def unix_address(path: Path) -> Iterator[str]:
    """An address for binding or connecting to a Unix socket at a path of any length; it holds inside the `with`.

    Linux takes at most 107 bytes. A longer path is reached through an open descriptor of its directory.
    """
    if len(os.fsencode(path)) <= _MAX_ADDRESS_BYTES:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def listen_unix(path: Path, *, private: bool = False) -> socket.socket:
    """A non-blocking Unix socket that listens at a path, whose directory is made if need be; a file that a dead
    process left there is replaced. Who may connect is for the umask to say, unless it is `private` to this user.

    Raises:
        AddressUnusable: another process listens there, or the path cannot be bound.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unix_address(path) as address:
            _remove_stale_socket(path, address)
            if private:
                # Before there is a file to change: Linux gives that the mode which the socket has.
                os.fchmod(listener.fileno(), 0o600)
            listener.bind(address)
    except OSError as error:
        listener.close()
        raise AddressUnusable(f"cannot listen on {path}: {error}; give another path") from error
    except AddressUnusable:
        listener.close()
        raise
    listener.listen(_BACKLOG)
    listener.setblocking(False)
    return listener


def _remove_stale_socket(path: Path, address: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(address)
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            # Only a socket refuses so: what else lies at the path fails in another way, and stays.
            if path.is_socket():
                path.unlink()
            return
    raise AddressUnusable(f"another process listens on {path}; stop it, or give another path")


class WriterClient:
    """Asks the writer process of a store. Each call makes a connection of its own, so that a script may use
    `asyncio.run(WriterClient(store).status())`."""

    def __init__(self, store: str | os.PathLike[str]) -> None:
        self._socket = writer_socket_path(Path(store))

    async def reload(
        self, view: str | None = None, *, snapshot: str | None = None, accept_schema_change: bool = False
    ) -> dict[str, Any]:
        """Have a view, or all views, loaded anew from the newest snapshot, or from the one named.

        Raises:
            WriterUnavailable: no writer answers.
            ShoalError: the writer's own error, of the class that it met.
        """
        body = {"view": view, "snapshot": snapshot, "accept_schema_change": accept_schema_change}
        return await self._ask("POST", "/reload", _RELOAD_SECONDS, body)

    async def status(self) -> dict[str, Any]:
        """What the writer says of itself; raises as `reload` does."""
        return await self._ask("GET", "/status", _STATUS_SECONDS)

    async def _ask(self, method: str, path: str, seconds: float, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = orjson.dumps(body) if body is not None else None
        try:
            with unix_address(self._socket) as address:
                connector, timeout = aiohttp.UnixConnector(address), aiohttp.ClientTimeout(total=seconds)
                async with (
                    aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
                    session.request(method, f"http://writer{path}", data=data) as response,
                ):
                    answer = await response.read()
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise WriterUnavailable(
                f"no writer answers on {self._socket} ({error or type(error).__name__}); `shoal serve` runs one"
            ) from error
        return self._checked(response.status, answer)

    def _checked(self, status: int, answer: bytes) -> dict[str, Any]:
        try:
            document: dict[str, Any] = orjson.loads(answer)
            if status == 200:
                return document
            code, message = document["error"]["code"], document["error"]["message"]
        except (orjson.JSONDecodeError, LookupError, TypeError) as error:
            raise WriterUnavailable(
                f"what answers on {self._socket} is no writer: status {status}, {answer[:100]!r}"
            ) from error
        kind = getattr(errors, code, ShoalError)
        raise (kind if isinstance(kind, type) and issubclass(kind, ShoalError) else ShoalError)(message)
