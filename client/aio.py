"""The client for asyncio; needs aiohttp (`pip install 'shoal[aio]'`)."""

import asyncio
import os
from collections.abc import Sequence
from datetime import timedelta
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

from shoal.client.addresses import Address
from shoal.client.answers import Answer, Pushed
from shoal.client.calls import Attempt, Call, Done, Outcome, Result, Steps
from shoal.client.core import Core
from shoal.client.errors import ClientClosed, ClientElsewhere, ClientForked, ShoalError
from shoal.client.sessions import FAILURES, Session
from shoal.client.settings import Settings, options
from shoal.client.wire import Columns, Format, Partial, Stale

if TYPE_CHECKING:
    import pyarrow as pa


class AsyncClient:
    """The counterpart of `shoal.client.Client` for one event loop: `async with AsyncClient(…) as client`.

    Arguments and errors are the same. In addition, its methods raise ClientElsewhere if they are called in a second
    event loop, and ClientForked if they are called in another process than the client's own.
    """

    def __init__(
        self,
        addresses: str | Sequence[str] | None = None,
        *,
        shards: Sequence[Sequence[str] | str] | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        self._options = options(addresses, shards, settings)
        self._core = Core(self._options, self._run_beside)
        self._sessions: dict[Address, Session] = {}
        self._process = os.getpid()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closed = False
        self._beside: set[asyncio.Task[None]] = set()

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
        """Look up features of many keys: see `shoal.client.Client.lookup`."""
        return await self._drive(
            self._core.lookup(
                features, entities, max_age=max_age, stale=stale, partial=partial, timeout=timeout, form=format
            )
        )

    async def push(
        self,
        view: str,
        rows: "Columns | pa.RecordBatch | pa.Table | None" = None,
        *,
        deletes: Columns | None = None,
        idempotency_key: str | None = None,
        timeout: float | None = None,
    ) -> Pushed:
        """Push rows: see `shoal.client.Client.push`."""
        return await self._drive(self._core.push(view, rows, deletes, idempotency_key, timeout))

    async def views(self, *, timeout: float | None = None) -> dict[str, Any]:
        """Return the schemas of all views, and the feature services."""
        return await self._drive(self._core.views(timeout))

    async def status(
        self,
        *,
        timeout: float | None = None,
    ) -> dict[str, dict[str, Any] | ShoalError]:
        """Return, by address, each server's document about itself, or the error."""
        return await self._drive(self._core.status(timeout))

    async def ready(self, *, timeout: float | None = None) -> bool:
        """Return whether each shard has a server that is ready to answer lookups."""
        return await self._drive(self._core.ready(timeout))

    async def close(self) -> None:
        """End all connections. Later calls raise ClientClosed."""
        self._check_place()
        self._is_closed = True
        for task in self._beside:
            task.cancel()
        for session in self._sessions.values():
            await session.close()

    async def __aenter__(self) -> Self:
        self._check_open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _check_place(self) -> None:
        if os.getpid() != self._process:
            raise ClientForked("this client belongs to the event loop of another process; make a new client here")
        loop = asyncio.get_running_loop()
        if self._loop is not None and self._loop is not loop:
            raise ClientElsewhere("this client was used in another event loop before; make one for each event loop")
        self._loop = loop

    def _check_open(self) -> None:
        self._check_place()
        if self._is_closed:
            raise ClientClosed("this client was closed; make a new one")

    def _run_beside(self, steps: Steps[None]) -> None:
        task = asyncio.create_task(self._carry_on(steps))
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)

    async def _drive(self, steps: Steps[Result]) -> Result:
        self._check_open()
        return await self._carry_on(steps)

    async def _carry_on(self, steps: Steps[Result]) -> Result:
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
            response = await self._session(attempt.replica.address).ask(call.request, attempt.headers, attempt.deadline)
        except FAILURES as error:
            call.failed(attempt, error, monotonic())
        else:
            call.answered(attempt, response, monotonic())

    def _session(self, address: Address) -> Session:
        session = self._sessions.get(address)
        if session is None:
            session = self._sessions[address] = Session(address, self._options.tls, self._options.connect_timeout)
        return session
