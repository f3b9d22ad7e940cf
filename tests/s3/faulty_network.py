"""A proxy between a client of S3 and its server that fails as networks and busy servers do."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web
from yarl import URL


@dataclass
class Fault:
    """What happens to requests of a method whose path and query hold a text: the first `times` of them.

    `status` answers instead of the server. `lost` breaks the connection off when the server has answered. `cut` does so
    after so many bytes of the body, `slow` waits so many seconds between blocks of it. `hangs` gives no answer at all.
    """

    method: str = "GET"
    text: str = ""
    times: float = 1
    status: int | None = None
    lost: bool = False
    cut: int | None = None
    slow: float = 0.0
    hangs: bool = False
    met: int = field(default=0)

    def takes(self, method: str, target: str) -> bool:
        if self.met >= self.times or method != self.method or self.text not in target:
            return False
        self.met += 1
        return True


class FaultyNetwork:
    """The proxy; `faults` may be changed at any time, and `requests` tells what came, as `METHOD TARGET`."""

    def __init__(self, server: str) -> None:
        self._server = server
        self.url = ""
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self._mended = asyncio.Event()

    def fail(self, **fault: Any) -> Fault:
        self.faults.append(Fault(**fault))
        return self.faults[-1]

    def mend(self) -> None:
        self.faults.clear()

    async def pass_on(self, request: web.Request) -> web.StreamResponse:
        target = request.raw_path
        self.requests.append(f"{request.method} {target}")
        fault = next((fault for fault in list(self.faults) if fault.takes(request.method, target)), Fault())
        while fault.hangs and fault in self.faults:
            await asyncio.sleep(0.02)
        body = await request.read()
        if fault.status is not None:
            if fault.status == 200:
                return web.Response(headers={"ETag": '"0"'})
            code = "SlowDown" if fault.status == 503 else "InternalError"
            text = f"<Error><Code>{code}</Code><Message>by the tests</Message></Error>"
            return web.Response(status=fault.status, text=text, content_type="application/xml")
        url = URL(self._server + target, encoded=True)
        async with (
            aiohttp.ClientSession(auto_decompress=False) as session,
            session.request(request.method, url, headers=request.headers, data=body, allow_redirects=False) as answer,
        ):
            content = await answer.read()
            assert request.transport is not None
            if fault.lost:
                request.transport.abort()
                return web.Response()
            response = web.StreamResponse(status=answer.status, headers=answer.headers)
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


@contextmanager
def faulty_network(server: str) -> Iterator[FaultyNetwork]:
    """A proxy before the server at a URL, in a thread of its own."""
    network, loop = FaultyNetwork(server), asyncio.new_event_loop()

    async def start() -> web.AppRunner:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", network.pass_on)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
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
