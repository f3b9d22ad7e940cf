"""The client for threads."""

import os
import select
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

from shoal.client.answers import Answer, Pushed
from shoal.client.calls import Attempt, Call, Done, Outcome, Result, Steps
from shoal.client.connections import FAILURES, ConnectionPool, Exchange
from shoal.client.core import Core
from shoal.client.errors import ClientClosed, ShoalError
from shoal.client.settings import Settings, options
from shoal.client.wire import Columns, Format, Partial, Stale

if TYPE_CHECKING:
    import pyarrow as pa

Flights = dict[Exchange, tuple[Call, Attempt]]
"""The exchanges in flight, each with its call and its attempt."""

_clients: "weakref.WeakSet[Client]" = weakref.WeakSet()


class Client:
    """A client that looks up features on Shoal's servers and pushes rows to them, for any number of threads. It also
    works after a fork: the child makes new connections.

    Args:
        addresses: `http://HOST:PORT`, `https://HOST:PORT` or `unix:PATH`: the address of one server, or the addresses
            of several servers with the same data.
        shards: instead of `addresses`: for each shard in order, its address or the addresses of its replicas.
        settings: see `shoal.client.settings.Settings`.

    Raises:
        AddressInvalid: an address is invalid, or occurs twice.
        RequestInvalid: a setting has an invalid value.
    """

    def __init__(
        self,
        addresses: str | Sequence[str] | None = None,
        *,
        shards: Sequence[Sequence[str] | str] | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        self._options = options(addresses, shards, settings)
        self._is_closed = False
        self._begin()
        _clients.add(self)

    def _begin(self) -> None:
        self._core = Core(self._options, self._run_beside)
        self._pools = {
            replica.address: ConnectionPool(replica.address, self._options.tls, self._options.connect_timeout)
            for replica in self._core.replicas
        }

    def lookup(
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
        """Look up features of many keys.

        Args:
            features: a list of `view:feature` (`view:*` for all of a view), or the name of a feature service.
            entities: join key → a list, NumPy array or Arrow array of values, or a scalar for all rows.
            max_age: the accepted age of a row, instead of each view's TTL: a text such as "12h", or a timedelta of
                whole seconds.
            stale: how to treat older rows: "null" their values, "serve" them, or "fail" the lookup.
            partial: what to do if rows do not arrive from their table in time: "serve" an answer without these rows, or
                "fail" the lookup. The answer's `partial` names the views of these rows.
            timeout: the timeout in seconds, instead of the client's.
            format: the format of the answer: "arrow" has every type and nulls; "npy" is one matrix of numbers, and is
                the fastest; "json" has statuses and event times.

        Raises:
            ServerError: the last tried server answered with an error.
            NoAnswer: no server answered.
            DeadlineExceeded: the timeout has passed.
            AnswerInvalid: a response does not answer this request.
            RequestInvalid: the client rejected the request before it was sent.
            ClientClosed: the client was closed.
            ShardsDisagree: the shards are at different positions in a view's log, and did not agree in time.
        """
        return self._drive(
            self._core.lookup(
                features, entities, max_age=max_age, stale=stale, partial=partial, timeout=timeout, form=format
            )
        )

    def push(
        self,
        view: str,
        rows: "Columns | pa.RecordBatch | pa.Table | None" = None,
        *,
        deletes: Columns | None = None,
        idempotency_key: str | None = None,
        timeout: float | None = None,
    ) -> Pushed:
        """Push rows to all replicas, because each replica has its own store. The rows are durable and visible when this
        returns.

        Args:
            view: the view of the rows.
            rows: column → values; or Arrow rows. Rows without an event time get the current time.
            deletes: the join keys of the rows to delete.
            idempotency_key: the key with which servers recognize a repeated push; the client makes one if this is None.
            timeout: the timeout in seconds, instead of the client's.

        Raises:
            PushIncomplete: some stores have the push, others may not; push it again under its `idempotency_key`.
            ShoalError: an error as in `lookup`, if the push goes to a single store. The error's `idempotency_key` is
                the key of the push.
        """
        return self._drive(self._core.push(view, rows, deletes, idempotency_key, timeout))

    def views(self, *, timeout: float | None = None) -> dict[str, Any]:
        """Return the schemas of all views, and the feature services, as in `GET /v1/views`; raise the errors of
        `lookup`."""
        return self._drive(self._core.views(timeout))

    def status(self, *, timeout: float | None = None) -> dict[str, dict[str, Any] | ShoalError]:
        """Return, by address, each server's document about itself (`GET /v1/status`), or the error."""
        return self._drive(self._core.status(timeout))

    def ready(self, *, timeout: float | None = None) -> bool:
        """Return whether each shard has a server that is ready to answer lookups."""
        return self._drive(self._core.ready(timeout))

    def close(self) -> None:
        """Close all connections. Calls under way still return; later calls raise ClientClosed."""
        self._is_closed = True
        for pool in self._pools.values():
            pool.close()

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClientClosed("this client was closed; make a new one")

    def _run_beside(self, steps: Steps[None]) -> None:
        # A RuntimeError means that no thread can be started, or that the interpreter is shutting down.
        with suppress(RuntimeError):
            threading.Thread(target=self._carry_on, args=(steps,), daemon=True, name="shoal-client").start()

    def _drive(self, steps: Steps[Result]) -> Result:
        self._check_open()
        return self._carry_on(steps)

    def _carry_on(self, steps: Steps[Result]) -> Result:
        try:
            calls = next(steps)
            while True:
                calls = steps.send(self._carry_out(calls))
        except StopIteration as end:
            result: Result = end.value
            return result

    def _carry_out(self, calls: list[Call]) -> list[Outcome]:
        """Carry out calls in parallel, all in this thread, which waits on all of their sockets at once."""
        flights: Flights = {}
        outcomes: dict[Call, Outcome] = {}
        try:
            while len(outcomes) < len(calls):
                until = self._advance([call for call in calls if call not in outcomes], flights, outcomes)
                if len(outcomes) == len(calls):
                    break
                alone = _only(flights) if len(calls) == 1 else None
                if alone is not None:
                    self._receive(alone, flights)
                else:
                    self._await_any(flights, until)
        finally:
            for exchange in flights:
                exchange.cancel()
            for call in calls:
                call.abandon()
        return [outcomes[call] for call in calls]

    def _advance(self, calls: list[Call], flights: Flights, outcomes: dict[Call, Outcome]) -> float:
        """Carry out all steps that calls can take now. Return the time of the next step, if no response arrives before;
        infinity if all calls are done."""
        soonest = float("inf")
        for call in calls:
            while isinstance(step := call.next(monotonic()), Attempt):
                try:
                    exchange = self._pools[step.replica.address].send(call.request, step.headers, step.deadline)
                except (*FAILURES, ShoalError) as error:
                    call.failed(step, error, monotonic())
                else:
                    flights[exchange] = (call, step)
            if isinstance(step, Done):
                outcomes[call] = step.outcome
                for exchange in [exchange for exchange, flight in flights.items() if flight[0] is call]:
                    del flights[exchange]
                    exchange.cancel()
            else:
                soonest = min(soonest, step.until)
        return soonest

    def _await_any(self, flights: Flights, until: float) -> None:
        """Continue the exchanges whose socket is ready, or whose connect timeout has passed."""
        poll = select.poll()
        numbers = {exchange.fileno(): exchange for exchange in flights}
        for number, exchange in numbers.items():
            if exchange.connect_until is None:
                poll.register(number, select.POLLIN)
            else:
                poll.register(number, select.POLLOUT)
                until = min(until, exchange.connect_until)
        # Round the wait up, because a wait that ends too early would have to start again.
        ready = {number for number, _ in poll.poll(max(0.0, 1000 * (until - monotonic())) + 1)}
        now = monotonic()
        for number, exchange in numbers.items():
            if exchange.connect_until is None:
                if number in ready:
                    self._receive(exchange, flights)
            elif number in ready or now >= exchange.connect_until:
                self._connect(exchange, flights, is_ready=number in ready)

    def _connect(self, exchange: Exchange, flights: Flights, *, is_ready: bool) -> None:
        call, attempt = flights[exchange]
        try:
            exchange.go_on(attempt.deadline, is_ready=is_ready)
        except FAILURES as error:
            del flights[exchange]
            call.failed(attempt, error, monotonic())

    def _receive(self, exchange: Exchange, flights: Flights) -> None:
        call, attempt = flights.pop(exchange)
        try:
            response = exchange.receive(attempt.deadline)
        except FAILURES as error:
            call.failed(attempt, error, monotonic())
        else:
            call.answered(attempt, response, monotonic())


def _only(flights: Flights) -> Exchange | None:
    """Return the only exchange in flight, if its request was sent and no other attempt will start before it ends.
    Otherwise return None."""
    if len(flights) != 1:
        return None
    ((exchange, (_, attempt)),) = flights.items()
    return exchange if attempt.is_alone and exchange.connect_until is None else None


def _begin_anew() -> None:
    """Reset all clients in a forked child: their connections belong to the parent, and their locks may be held by
    threads that do not exist in the child."""
    for client in list(_clients):
        client._begin()


os.register_at_fork(after_in_child=_begin_anew)
