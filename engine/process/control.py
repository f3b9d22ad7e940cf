"""The writer's control socket: its path, how to bind it, and the client that sends orders to the writer.

    POST   /reload      {"view": str | null, "snapshot": str | null, "accept_schema_change": bool} -> {"views": [...]}
    POST   /push?view=  rows as `shoal.engine.push.pushed_rows` encodes them -> {"rows": int,
                        "superseded": int, "version": int}; the headers carry the request's id and the digest of the
                        client's content
    PUT    /views       a view's schema: define the view, or change it to this schema
    DELETE /views/NAME  drop the view
    GET    /status      -> a document about the writer

When all views are reloaded, a view that fails does not stop the others: its item in the answer is
{"view": str, "error": …}.

The response to a failed request has the error's `http_status` and the body {"error": {"code": name of its class,
"message": str}}. A worker answers its own clients in the same form. The body for UnknownFeature also has "what" and
"name".
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

from shoal.engine.base import errors
from shoal.engine.base.errors import AddressUnusable, ShoalError, UnknownFeature, WriterUnavailable
from shoal.engine.base.system import O_PATH, descriptor_path
from shoal.engine.format.schema import ViewSchema
from shoal.engine.push.pushed_rows import serialize_rows

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
"""The header with the id of a push. The writer recognizes a repeated push by this id."""

CONTENT_HEADER = "X-Shoal-Content"
"""The header with the digest of a pushed content, in hexadecimal digits. By this digest, the writer distinguishes a
repeated push from a different push under the same id."""


def writer_socket_path(store: Path) -> Path:
    """Return the path of the socket on which the writer of a store listens."""
    return store / "run" / "writer.sock"


def writer_answers(store: Path) -> bool:
    """Return whether a writer accepts connections."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, unix_address(writer_socket_path(store)) as address:
        try:
            probe.connect(address)
        except OSError:
            return False
        return True


def error_document(error: ShoalError) -> dict[str, Any]:
    """Return the JSON form of an error."""
    more = {"what": error.what, "name": error.name} if isinstance(error, UnknownFeature) else {}
    return {"error": {"code": type(error).__name__, "message": str(error)} | more}


def error_in(document: dict[str, Any]) -> ShoalError:
    """Return the exception for an error's JSON form. Its class is the class that the JSON form names."""
    error = document["error"]
    code = error["code"]
    message = error["message"]
    if code == UnknownFeature.__name__ and "what" in error:
        return UnknownFeature(message, error["what"], error["name"])
    kind = getattr(errors, code, ShoalError)
    return (kind if isinstance(kind, type) and issubclass(kind, ShoalError) else ShoalError)(message)


def first_failure(views: list[dict[str, Any]]) -> ShoalError | None:
    """Return the first error among the views of an answer to /reload; None if all views were reloaded."""
    return next((error_in(view) for view in views if "error" in view), None)


@contextmanager
def unix_address(path: Path, within: Path | None = None) -> Iterator[str]:
    """Yield an address for binding or connecting to a Unix socket at a path of any length, valid inside the `with`.

    Linux accepts at most 107 bytes. A longer path is reached through an open descriptor of its directory. If this
    directory may be removed and created again meanwhile, pass one of its parent directories as `within`.
    """
    if len(os.fsencode(path)) <= _MAX_ADDRESS_BYTES:
        yield str(path)
        return
    start = within if within is not None else path.parent
    directory = os.open(start, O_PATH | os.O_DIRECTORY)
    try:
        yield f"{descriptor_path(directory)}/{path.relative_to(start)}"
    finally:
        os.close(directory)


def listen_unix(path: Path, *, private: bool = False) -> socket.socket:
    """Return a non-blocking Unix socket that listens at a path.

    The path's directory is created if it is missing. A socket file of a dead process is replaced. The umask decides
    who may connect; if the socket is `private`, only this user may.

    Raises:
        AddressUnusable: another process listens there, or the path cannot be bound.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unix_address(path) as address:
            _remove_stale_socket(path, address)
            if private:
                # `bind` creates the file, and Linux gives the file the mode of the socket. So set the socket's mode
                # first.
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
            # Only a socket refuses a connection. Any other file fails with another error, and is not removed.
            if path.is_socket():
                path.unlink()
            return
    raise AddressUnusable(f"another process listens on {path}; stop it, or give another path")


class WriterClient:
    """A client of a store's writer process.

    Each call makes its own connection, so that a script may use `asyncio.run(WriterClient(store).status())`. Inside
    `async with`, connections are kept for the next call.

    Args:
        patience: how many seconds a push waits for a writer if none answers.
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
        """Reload a view, or all views, from the newest snapshot or from the named one.

        If all views are reloaded, the answer names the views that failed (see `first_failure`).

        Raises:
            WriterUnavailable: no writer answers.
            ShoalError: the writer's own error, with its class.
        """
        body = {"view": view, "snapshot": snapshot, "accept_schema_change": accept_schema_change}
        return await self._ask("POST", "/reload", _RELOAD_SECONDS, orjson.dumps(body))

    async def push(
        self, view: str, rows: Sequence[pa.RecordBatch], request_id: str | None = None, content: bytes = b""
    ) -> dict[str, Any]:
        """Write rows, in the form of `shoal.engine.push.pushed_rows`, to a view. The rows are on the disk when this
        returns.

        Args:
            request_id: the id with which the writer recognizes a repeated push.
            content: a digest of the client's content, with which the writer recognizes a different push under the same
                id.

        Raises:
            WriterUnavailable: no writer answers. It is unknown whether the writer wrote the rows.
            ShoalError: the writer's own error, with its class.
        """
        # A push without an answer is sent again. Because of its id, the writer does not apply it twice.
        headers = {REQUEST_ID_HEADER: request_id, CONTENT_HEADER: content.hex()} if request_id else {}
        body = serialize_rows(rows)
        path = f"/push?view={quote(view)}"
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
        """Define a view outside of all export roots, or change the view to this schema; raise the errors of
        `reload`."""
        await self._ask("PUT", "/views", _PUSH_SECONDS, schema.model_dump_json().encode())

    async def drop_view(self, view: str) -> None:
        """Drop a view; raise the errors of `reload`."""
        await self._ask("DELETE", f"/views/{quote(view)}", _PUSH_SECONDS)

    async def status(self) -> dict[str, Any]:
        """Return the writer's document about itself; raise the errors of `reload`."""
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
                f"the process that answers on {self._socket} is not a writer: status {status}, {answer[:100]!r}"
            ) from error
        raise error_met
