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
from typing import Any, Self, Unpack

import pyarrow as pa

from shoal_client.answers import Answer, Pushed
from shoal_client.calls import Attempt, Call, Done, Outcome, Result, Steps
from shoal_client.connections import FAILURES, ConnectionPool, Exchange
from shoal_client.core import Core
from shoal_client.errors import ClientClosed, ShoalError
from shoal_client.settings import Settings, options
from shoal_client.wire import Columns, Format, Partial, Stale

Flights = dict[Exchange, tuple[Call, Attempt]]
"""What is on its way."""

_clients: "weakref.WeakSet[Client]" = weakref.WeakSet()


class Client:
    """Looks up features on Shoal's servers, and pushes rows to them, from any number of threads; also after a fork,
    when it makes connections anew.

    Args:
        addresses: `http://HOST:PORT`, `https://HOST:PORT` or `unix:PATH`, of one server or of several that have the
            same data.
        shards: instead, for each shard in order, its address or those of its replicas.
        settings: see `shoal_client.settings.Settings`.

    Raises:
        AddressInvalid: an address is none.
        RequestInvalid: a setting has a value that it cannot have.
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
            entities: join key → a list, NumPy array or Arrow array of values, or a scalar that holds for every row.
            max_age: the age of a row that is accepted, instead of each view's TTL: a text such as "12h", or a timedelta
                of whole seconds.
            stale: how to treat older rows: "null" their values, "serve" them, or "fail" the lookup.
            partial: whether an answer may lack rows of tables that did not arrive in time. The answer's `partial` names
                their views.
            timeout: seconds that it may take, instead of the client's.
            format: what the answer comes in: "arrow" has every type and nulls, "npy" is one matrix of numbers and the
                fastest, "json" has statuses and event times.

        Raises:
            ServerError: the last server that was tried answered with an error.
            NoAnswer: no server answered.
            DeadlineExceeded: the timeout has passed.
            AnswerInvalid: a response does not answer this request.
            RequestInvalid: the request was refused before it was sent.
            ClientClosed: the client was closed.
            ShardsDisagree: shards are not at one version, and did not get there in time.
        """
        return self._drive(
            self._core.lookup(
                features, entities, max_age=max_age, stale=stale, partial=partial, timeout=timeout, form=format
            )
        )

    def push(
        self,
        view: str,
        rows: Columns | pa.RecordBatch | pa.Table | None = None,
        *,
        deletes: Columns | None = None,
        idempotency_key: str | None = None,
        timeout: float | None = None,
    ) -> Pushed:
        """Push rows to all replicas, each of which has a store of its own; they are durable and visible when this
        returns.

        Args:
            view: the view that they are rows of.
            rows: column → values; or in Arrow. Without an event time they are of now.
            deletes: the join keys of rows that are to go.
            idempotency_key: by this a push that comes again is known; the client makes one if None.
            timeout: seconds that it may take, instead of the client's.

        Raises:
            PushIncomplete: some stores have it, others may not; push it again under its `idempotency_key`.
            ShoalError: as `lookup`, of a single store; its `idempotency_key` is that of the push.
        """
        return self._drive(self._core.push(view, rows, deletes, idempotency_key, timeout))

    def views(self, *, timeout: float | None = None) -> dict[str, Any]:
        """The schemas of all views, and the feature services, as `GET /v1/views` has them; raises as `lookup`."""
        return self._drive(self._core.views(timeout))

    def status(self, *, timeout: float | None = None) -> dict[str, dict[str, Any] | ShoalError]:
        """By address, what each server says of itself (`GET /v1/status`), or why it does not."""
        return self._drive(self._core.status(timeout))

    def ready(self, *, timeout: float | None = None) -> bool:
        """Whether there is a server that answers lookups, of each shard."""
        return self._drive(self._core.ready(timeout))

    def close(self) -> None:
        """Close all connections. Calls that have begun still return; later ones raise ClientClosed."""
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
        # RuntimeError: no thread can be started, or the interpreter is shutting down.
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
        """Carry out calls side by side, all in this thread: it waits on their sockets together."""
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
        """Have calls do what they can do now; until when there is nothing more to do."""
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
        # Rounded up: a wait that ends early would only be begun again.
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
    """Return the exchange whose answer is the only thing to wait for; None if there are others, or it was not sent
    yet."""
    if len(flights) != 1:
        return None
    ((exchange, (_, attempt)),) = flights.items()
    return exchange if attempt.is_alone and exchange.connect_until is None else None


def _begin_anew() -> None:
    """In a forked child: connections are the parent's, and locks may be held by threads that are not here."""
    for client in list(_clients):
        client._begin()


os.register_at_fork(after_in_child=_begin_anew)
