"""The client for asyncio; needs aiohttp (`pip install 'shoal-client[aio]'`)."""

import asyncio
import os
from collections.abc import Sequence
from datetime import timedelta
from time import monotonic
from types import TracebackType
from typing import Any, Self, Unpack

import aiohttp
import pyarrow as pa

from shoal_client.addresses import Address
from shoal_client.answers import Answer, Pushed
from shoal_client.calls import CLOSE_SECONDS, Attempt, Call, Done
from shoal_client.core import Core, Outcome, Result, Steps
from shoal_client.errors import ClientForked, ShoalError
from shoal_client.replicas import Replica
from shoal_client.settings import Settings, options
from shoal_client.wire import READ_HEADERS, Columns, Format, Partial, Response, Stale

_FAILURES = (aiohttp.ClientError, OSError, TimeoutError, ValueError)


class AsyncClient:
    """`shoal_client.Client` for one event loop: `async with AsyncClient(…) as client`. Arguments and errors are the
    same, and besides ClientForked where it is used in another process than it was made in.
    """

    def __init__(
        self,
        addresses: str | Sequence[str] | None = None,
        *,
        shards: Sequence[Sequence[str] | str] | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        self._options = options(addresses, shards, settings)
        self._core = Core(self._options)
        self._sessions: dict[Replica, aiohttp.ClientSession] = {}
        self._process = os.getpid()

    async def lookup(
        self,
        features: str | Sequence[str],
        entities: Columns,
        *,
        max_age: str | timedelta | None = None,
        stale: Stale = "null",
        partial: Partial = "serve",
        timeout: float | None = None,
        format: Format = "arrow",
    ) -> Answer:
        """Look up features of many keys: see `shoal_client.Client.lookup`."""
        return await self._drive(
            self._core.lookup(
                features, entities, max_age=max_age, stale=stale, partial=partial, timeout=timeout, form=format
            )
        )

    async def push(
        self,
        view: str,
        rows: Columns | pa.RecordBatch | pa.Table | None = None,
        *,
        deletes: Columns | None = None,
        idempotency_key: str | None = None,
        timeout: float | None = None,
    ) -> Pushed:
        """Push rows: see `shoal_client.Client.push`."""
        return await self._drive(self._core.push(view, rows, deletes, idempotency_key, timeout))

    async def views(self, *, timeout: float | None = None) -> dict[str, Any]:
        """The schemas of all views, and the feature services."""
        return await self._drive(self._core.views(timeout))

    async def status(
        self,
        *,
        timeout: float | None = None,
    ) -> dict[str, dict[str, Any] | ShoalError]:
        """By address, what each server says of itself, or why it does not."""
        return await self._drive(self._core.status(timeout))

    async def ready(self, *, timeout: float | None = None) -> bool:
        """Whether there is a server that answers lookups, of each shard."""
        return await self._drive(self._core.ready(timeout))

    async def close(self) -> None:
        """End all connections; the client can be used again."""
        sessions, self._sessions = self._sessions, {}
        for session in sessions.values():
            await session.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _drive(self, steps: Steps[Result]) -> Result:
        if os.getpid() != self._process:
            raise ClientForked("this client was made in another process, whose event loop it belongs to; make one here")
        try:
            calls = next(steps)
            while True:
                if len(calls) == 1:
                    outcomes: list[Outcome] = [await self._carry_out(calls[0])]
                else:
                    outcomes = await asyncio.gather(*map(self._carry_out, calls))
                calls = steps.send(outcomes)
        except StopIteration as end:
            result: Result = end.value
            return result

    async def _carry_out(self, call: Call) -> Outcome:
        flights: dict[asyncio.Task[None], Attempt] = {}
        try:
            while True:
                step = call.next(monotonic())
                if isinstance(step, Done):
                    return step.outcome
                if isinstance(step, Attempt):
                    if step.is_alone:
                        await self._exchange(call, step)
                    else:
                        flights[asyncio.create_task(self._exchange(call, step))] = step
                    continue
                patience = max(0.0, step.until - monotonic())
                if flights:
                    ended, _ = await asyncio.wait(flights, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
                    for task in ended:
                        del flights[task]
                        task.result()
                else:
                    await asyncio.sleep(patience)
        finally:
            call.abandon()
            for task in flights:
                task.cancel()
            if flights:
                await asyncio.wait(flights)

    async def _exchange(self, call: Call, attempt: Attempt) -> None:
        try:
            response = await self._ask(call, attempt)
        except _FAILURES as error:
            # One that ended with the deadline is the call's to judge.
            if monotonic() < attempt.deadline - CLOSE_SECONDS:
                call.failed(attempt, error, monotonic())
        else:
            call.answered(attempt, response, monotonic())

    async def _ask(self, call: Call, attempt: Attempt) -> Response:
        address, request = attempt.replica.address, call.request
        remaining = attempt.deadline - monotonic()
        if remaining <= 0:
            raise TimeoutError
        patience = min(remaining, self._options.connect_timeout)
        timeout = aiohttp.ClientTimeout(total=remaining, sock_connect=patience)
        url = f"{'https' if address.tls else 'http'}://{address.host_header}{request.path}"
        async with self._session(attempt.replica).request(
            request.method,
            url,
            data=request.body or None,
            headers=attempt.headers,
            timeout=timeout,
            allow_redirects=False,
        ) as response:
            body = await response.read()
        headers = {name: value for name in READ_HEADERS if (value := response.headers.get(name)) is not None}
        return Response(response.status, headers, body, address.text)

    def _session(self, replica: Replica) -> aiohttp.ClientSession:
        session = self._sessions.get(replica)
        if session is None:
            session = self._sessions[replica] = aiohttp.ClientSession(
                connector=self._connector(replica.address),
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                skip_auto_headers=("User-Agent", "Accept-Encoding", "Content-Type"),
            )
        return session

    def _connector(self, address: Address) -> aiohttp.BaseConnector:
        if address.path is not None:
            return aiohttp.UnixConnector(address.path, limit=0)
        return aiohttp.TCPConnector(limit=0, ssl=self._options.tls or True)
