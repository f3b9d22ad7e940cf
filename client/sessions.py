"""Connections of the asynchronous client, over aiohttp: a bounded number to each server.

The connect timeout does not count the time in which the event loop does something else.
"""

import asyncio
import ssl
from collections.abc import Coroutine, Mapping
from time import monotonic
from typing import Any

import aiohttp
from aiohttp.client_proto import ResponseHandler

from shoal.client.addresses import Address
from shoal.client.calls import Unreached
from shoal.client.wire import READ_HEADERS, TIMEOUT_HEADER, Request, Response

FAILURES = (aiohttp.ClientError, OSError, TimeoutError, ValueError)
"""The exceptions of a failed connection."""

MOST_CONNECTIONS = 100
"""The maximum number of connections to one server: less than the usual backlog of a listening socket (128)."""
_TURNS = 10


class Session:
    """Connections to one server, for one event loop."""

    def __init__(self, address: Address, tls: ssl.SSLContext | None, connect_timeout: float) -> None:
        self._address = address
        self._free = asyncio.Semaphore(MOST_CONNECTIONS)
        self._root = f"{'https' if address.tls else 'http'}://{address.host_header}"
        connector: aiohttp.BaseConnector
        if address.path is not None:
            connector = _UnixConnector(connect_timeout, address.path, limit=0)
        else:
            connector = _TcpConnector(connect_timeout, limit=0, ssl=tls or True)
        self._http = aiohttp.ClientSession(
            connector=connector,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("User-Agent", "Accept-Encoding", "Content-Type"),
        )

    async def ask(self, request: Request, headers: Mapping[str, str], deadline: float) -> Response:
        """Send a request; return its response.

        Raises:
            Unreached: no connection to the server was made.
            Exception: one of FAILURES: the connection ended, or `deadline` passed.
        """
        async with asyncio.timeout(deadline - monotonic()), self._free:
            # Send the server the time that is left after the request has waited for a connection.
            left = {TIMEOUT_HEADER: str(max(1, int(1000 * (deadline - monotonic()))))}
            sent = self._http.request(
                request.method,
                self._root + request.path,
                data=request.body or None,
                headers={**headers, **left},
                timeout=_NO_TIMEOUT,
                allow_redirects=False,
            )
            try:
                response = await sent
            except aiohttp.ClientConnectorError as error:
                raise Unreached(str(error)) from error
            async with response:
                body = await response.read()
        kept = {name: value for name in READ_HEADERS if (value := response.headers.get(name)) is not None}
        return Response(response.status, kept, body, self._address.text)

    async def close(self) -> None:
        """Close all connections."""
        await self._http.close()


_NO_TIMEOUT = aiohttp.ClientTimeout()
"""The deadline is enforced outside of aiohttp, which rounds longer timeouts up to whole seconds."""


class _TcpConnector(aiohttp.TCPConnector):
    def __init__(self, connect_timeout: float, **options: Any) -> None:
        super().__init__(**options)
        self._connect_timeout = connect_timeout

    async def _create_connection(self, *args: Any) -> ResponseHandler:
        return await _in_turns(super()._create_connection(*args), self._connect_timeout)


class _UnixConnector(aiohttp.UnixConnector):
    def __init__(self, connect_timeout: float, path: str, **options: Any) -> None:
        super().__init__(path, **options)
        self._connect_timeout = connect_timeout

    async def _create_connection(self, *args: Any) -> ResponseHandler:
        return await _in_turns(super()._create_connection(*args), self._connect_timeout)


async def _in_turns(connecting: Coroutine[Any, Any, ResponseHandler], seconds: float) -> ResponseHandler:
    """Connect within some seconds, not counting time in which the event loop is busy.

    A timer also counts the time in which the loop was busy with other tasks. When the timer fires, the loop may not
    have noticed yet that the connection is made. So the timeout is divided into parts, and the loop polls its sockets
    in each part.

    Raises:
        Unreached: no connection was made.
    """
    task = asyncio.ensure_future(connecting)
    try:
        for _ in range(_TURNS):
            await asyncio.wait((task,), timeout=seconds / _TURNS)
            if task.done():
                return task.result()
        raise Unreached(f"no connection was made in {seconds:g} s")
    except BaseException:
        if not task.cancel() and not task.cancelled() and task.exception() is None:
            task.result().close()
        raise
