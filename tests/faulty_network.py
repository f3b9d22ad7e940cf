"""A proxy between a client of S3 or DynamoDB and its server. It fails as networks and busy servers do."""

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web
from yarl import URL


@dataclass
class Fault:
    """A fault that the first `times` requests of a kind meet, each with the probability `chance`.

    The requests have the method, and contain the text in path and query. For DynamoDB, the operation or the body may
    also contain the text.

    With `status`, the proxy answers instead of the server, with the error code `code`. `lost` breaks the connection
    after the server has answered. `cut` breaks it after this many bytes of the body. `slow` waits this many seconds
    between blocks of the body. `late` waits this many seconds before the request is passed on. `hangs` gives no answer
    at all. `changes` gets the bodies of the request and the answer, and returns the body to send.
    """

    method: str = "GET"
    text: str = ""
    times: float = 1
    status: int | None = None
    lost: bool = False
    cut: int | None = None
    slow: float = 0.0
    late: float = 0.0
    hangs: bool = False
    code: str | None = None
    chance: float = 1.0
    changes: Callable[[bytes, bytes], bytes] | None = None
    met: int = field(default=0)

    def takes(self, method: str, target: str) -> bool:
        if self.met >= self.times or method != self.method or self.text not in target:
            return False
        if self.chance < 1 and random.random() >= self.chance:
            return False
        self.met += 1
        return True


class FaultyNetwork:
    """The proxy. `faults` may be changed at any time. `requests` lists what was received, as `METHOD TARGET`."""

    def __init__(self, server: str) -> None:
        self._server = server
        self.url = ""
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self._session: aiohttp.ClientSession | None = None

    def fail(self, **fault: Any) -> Fault:
        self.faults.append(Fault(**fault))
        return self.faults[-1]

    def mend(self) -> None:
        self.faults.clear()

    def session(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                auto_decompress=False, connector=aiohttp.TCPConnector(limit=0), cookie_jar=aiohttp.DummyCookieJar()
            )
        return self._session

    async def close(self, _app: web.Application) -> None:
        if self._session is not None:
            await self._session.close()

    async def pass_on(self, request: web.Request) -> web.StreamResponse:
        operation = request.headers.get("X-Amz-Target", "").rpartition(".")[2]
        target = request.raw_path + operation
        self.requests.append(f"{request.method} {target}")
        body = await request.read()
        # The body of a request to DynamoDB says what the request is about.
        about = target + body.decode() if operation else target
        fault = next((fault for fault in list(self.faults) if fault.takes(request.method, about)), Fault())
        while fault.hangs and fault in self.faults:
            await asyncio.sleep(0.02)
        passed_on_at = time.monotonic() + fault.late
        while time.monotonic() < passed_on_at and fault in self.faults:
            await asyncio.sleep(min(0.02, fault.late))
        if fault.status is not None:
            return _refusal(fault, operation)
        url = URL(self._server + request.raw_path, encoded=True)
        sent = self.session().request(request.method, url, headers=request.headers, data=body, allow_redirects=False)
        async with sent as answer:
            content = await answer.read()
            if request.transport is None:  # The client has closed the connection.
                return web.Response()
            if fault.lost:
                request.transport.abort()
                return web.Response()
            headers = answer.headers.copy()
            if fault.changes is not None:
                content = fault.changes(body, content)
                for name in ("Content-Length", "x-amz-crc32"):
                    headers.popall(name, None)
            response = web.StreamResponse(status=answer.status, headers=headers)
            await response.prepare(request)
            if request.method == "HEAD":
                return response
            for start in range(0, len(content), 64 << 10):
                if fault.cut is not None and start >= fault.cut:
                    request.transport.abort()
                    return response
                await response.write(content[start : start + (64 << 10)])
                await asyncio.sleep(fault.slow)
            return response


def _refusal(fault: Fault, operation: str) -> web.Response:
    """Return an answer that does not come from the server."""
    assert fault.status is not None
    if fault.status == 200:
        return web.Response(headers={"ETag": '"0"'})
    if operation:
        error = {
            "__type": f"com.amazonaws.dynamodb.v20120810#{fault.code or 'InternalServerError'}",
            "message": "tests",
        }
        return web.json_response(error, status=fault.status, content_type="application/x-amz-json-1.0")
    code = fault.code or ("SlowDown" if fault.status == 503 else "InternalError")
    text = f"<Error><Code>{code}</Code><Message>by the tests</Message></Error>"
    return web.Response(status=fault.status, text=text, content_type="application/xml")


@contextmanager
def faulty_network(server: str) -> Iterator[FaultyNetwork]:
    """Run a proxy in front of the server at a URL, in its own thread."""
    network = FaultyNetwork(server)
    loop = asyncio.new_event_loop()

    async def start() -> web.AppRunner:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", network.pass_on)
        app.on_cleanup.append(network.close)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        network.url = f"http://{host}:{port}"
        return runner

    runner = loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield network
    finally:
        network.mend()
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()
