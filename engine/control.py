"""The writer's control socket: where it is, how to bind it, and the client that asks the writer for something.

    POST   /reload      {"view": str | null, "snapshot": str | null, "accept_schema_change": bool} -> {"views": [...]}
    POST   /push?view=  rows as `engine.pushed_rows` encodes them -> {"rows": int, "superseded": int, "version": int};
                        in headers, the request's id and the digest of what the client sent
    PUT    /views       a view's schema: it is defined, or changed to it
    DELETE /views/NAME  the view is dropped
    GET    /status      -> a document about the writer

Of all views, one that cannot be reloaded holds up no other: it is answered as {"view": str, "error": …}.

An error is answered with its `http_status` and {"error": {"code": name of its class, "message": str}}, the same form in
which the worker answers its own clients; UnknownFeature's has "what" and "name", too.
"""

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self
from urllib.parse import quote

import aiohttp
import orjson
import pyarrow as pa

from engine import errors
from engine.errors import AddressUnusable, ShoalError, UnknownFeature, WriterUnavailable
from engine.pushed_rows import encode_rows
from engine.schema import ViewSchema

_MAX_ADDRESS_BYTES = 107
_BACKLOG = 1024
_CONNECTIONS = 256
_RELOAD_SECONDS = 3600
_STATUS_SECONDS = 10
_PUSH_SECONDS = 60
_NEXT_TRY_SECONDS = 0.05
_MOST_WAITING_BYTES = 32 << 20

_NO_HEADERS: Mapping[str, str] = MappingProxyType({})

REQUEST_ID_HEADER = "Idempotency-Key"
"""By this a push that comes again is known."""

CONTENT_HEADER = "X-Shoal-Content"
"""The digest of what a client pushed, in hexadecimal digits: by this another push under the same id is known."""


def writer_socket_path(store: Path) -> Path:
    """Where the writer of a store listens."""
    return store / "run" / "writer.sock"


def writer_answers(store: Path) -> bool:
    """Whether a writer takes connections."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, unix_address(writer_socket_path(store)) as address:
        try:
            probe.connect(address)
        except OSError:
            return False
        return True


def error_document(error: ShoalError) -> dict[str, Any]:
    """The JSON form of an error."""
    more = {"what": error.what, "name": error.name} if isinstance(error, UnknownFeature) else {}
    return {"error": {"code": type(error).__name__, "message": str(error)} | more}


def error_in(document: dict[str, Any]) -> ShoalError:
    """The error in its JSON form, as an exception of the class that was met."""
    error = document["error"]
    code, message = error["code"], error["message"]
    if code == UnknownFeature.__name__ and "what" in error:
        return UnknownFeature(message, error["what"], error["name"])
    kind = getattr(errors, code, ShoalError)
    return (kind if isinstance(kind, type) and issubclass(kind, ShoalError) else ShoalError)(message)


def first_failure(views: list[dict[str, Any]]) -> ShoalError | None:
    """The first error among the views that were reloaded."""
    return next((error_in(view) for view in views if "error" in view), None)


@contextmanager
def unix_address(path: Path, within: Path | None = None) -> Iterator[str]:
    """An address for binding or connecting to a Unix socket at a path of any length; it holds inside the `with`.

    Linux takes at most 107 bytes. A longer path is reached through an open descriptor of its directory. If that
    directory may be removed and created again meanwhile, give one that contains it as `within`.
    """
    if len(os.fsencode(path)) <= _MAX_ADDRESS_BYTES:
        yield str(path)
        return
    start = within if within is not None else path.parent
    directory = os.open(start, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{path.relative_to(start)}"
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
    `asyncio.run(WriterClient(store).status())`; inside `async with` connections are kept for the next call.

    Args:
        patience: for how many seconds a push that finds no writer waits for one.
    """

    def __init__(self, store: str | os.PathLike[str], *, patience: float = 0.0) -> None:
        self._patience = patience
        self._waiting_bytes = 0
        self._store = Path(store)
        self._socket = writer_socket_path(self._store)
        self._kept: aiohttp.ClientSession | None = None
        self._closing = AsyncExitStack()

    async def __aenter__(self) -> Self:
        self._kept = await self._closing.enter_async_context(self._session())
        return self

    async def __aexit__(self, *error: object) -> None:
        self._kept = None
        await self._closing.aclose()

    async def reload(
        self, view: str | None = None, *, snapshot: str | None = None, accept_schema_change: bool = False
    ) -> dict[str, Any]:
        """Have a view, or all views, loaded anew from the newest snapshot, or from the one named.

        Of all views, the answer tells which could not be (see `first_failure`).

        Raises:
            WriterUnavailable: no writer answers.
            ShoalError: the writer's own error, of the class that it met.
        """
        body = {"view": view, "snapshot": snapshot, "accept_schema_change": accept_schema_change}
        return await self._ask("POST", "/reload", _RELOAD_SECONDS, orjson.dumps(body))

    async def push(
        self, view: str, rows: Sequence[pa.RecordBatch], request_id: str | None = None, content: bytes = b""
    ) -> dict[str, Any]:
        """Have rows, as `engine.pushed_rows` makes them, written to a view; they are on the disk when this returns.

        Args:
            request_id: by this the push is known if it comes again.
            content: a digest of what the client sent, by which another push under the same id is known.

        Raises:
            WriterUnavailable: no writer answers; whether it wrote the rows is not known.
            ShoalError: the writer's own error, of the class that it met.
        """
        # By its id a push is not applied twice that was sent again because it had no answer.
        headers = {REQUEST_ID_HEADER: request_id, CONTENT_HEADER: content.hex()} if request_id else {}
        body, path = encode_rows(rows), f"/push?view={quote(view)}"
        deadline = time.monotonic() + self._patience
        while True:
            try:
                return await self._ask("POST", path, _PUSH_SECONDS, body, headers)
            except WriterUnavailable:
                if time.monotonic() > deadline or self._waiting_bytes + len(body) > _MOST_WAITING_BYTES:
                    raise
            self._waiting_bytes += len(body)
            try:
                await asyncio.sleep(_NEXT_TRY_SECONDS)
            finally:
                self._waiting_bytes -= len(body)

    async def define_view(self, schema: ViewSchema) -> None:
        """Have a view defined that no root publishes, or changed to this schema; raises as `reload` does."""
        await self._ask("PUT", "/views", _PUSH_SECONDS, schema.model_dump_json().encode())

    async def drop_view(self, view: str) -> None:
        """Have a view dropped; raises as `reload` does."""
        await self._ask("DELETE", f"/views/{quote(view)}", _PUSH_SECONDS)

    async def status(self) -> dict[str, Any]:
        """What the writer says of itself; raises as `reload` does."""
        return await self._ask("GET", "/status", _STATUS_SECONDS)

    async def _ask(
        self,
        method: str,
        path: str,
        seconds: float,
        body: bytes | None = None,
        headers: Mapping[str, str] = _NO_HEADERS,
    ) -> dict[str, Any]:
        timeout = aiohttp.ClientTimeout(total=seconds)
        try:
            async with AsyncExitStack() as closing:
                session = self._kept
                if session is None:
                    session = await closing.enter_async_context(self._session())
                asking = session.request(method, f"http://writer{path}", data=body, headers=headers, timeout=timeout)
                response = await closing.enter_async_context(asking)
                answer = await response.read()
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise WriterUnavailable(
                f"no writer answers on {self._socket} ({error or type(error).__name__}); `shoal serve` runs one"
            ) from error
        return self._checked(response.status, answer)

    @asynccontextmanager
    async def _session(self) -> AsyncIterator[aiohttp.ClientSession]:
        with unix_address(self._socket, self._store) as address:
            async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(address, limit=_CONNECTIONS)) as session:
                yield session

    def _checked(self, status: int, answer: bytes) -> dict[str, Any]:
        try:
            document: dict[str, Any] = orjson.loads(answer)
            if not isinstance(document, dict):
                raise TypeError("it is not a JSON object")
            if status == 200:
                return document
            error_met = error_in(document)
        except (orjson.JSONDecodeError, LookupError, TypeError) as error:
            raise WriterUnavailable(
                f"what answers on {self._socket} is no writer: status {status}, {answer[:100]!r}"
            ) from error
        raise error_met
