"""Simultaneous clients of a server at a steady rate: lookups over kept and over new connections, lookups over gRPC,
pushes, and reads of the server's metrics. The clients check every answer.

Requests are sent when they are due, whatever happened to earlier requests. Latency counts from the due time. An answer
is wrong if its version is older than the version of an earlier answer, or if one of its rows contradicts the ledgers.
"""

import http.client
import random
import select
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import orjson

from perf import answers
from perf.dataset import Dataset, document_keys, values
from perf.ledger import Ledger

_PATIENCE_SECONDS = 60.0
_KEPT_EXAMPLES = 5
_SHOWN_CHARACTERS = 400


@dataclass(frozen=True)
class Load:
    """The load of each kind of client. All rates are per second. `kept` is the number of clients that keep their
    connection, and `fresh` the number of clients that open a new connection for each request. A lookup has `keys` keys,
    and a push has `pushed` rows."""

    kept: int = 6
    kept_rate: float = 80.0
    fresh: int = 2
    fresh_rate: float = 20.0
    grpc_rate: float = 5.0
    push_rate: float = 5.0
    scrape_rate: float = 0.2
    keys: int = 50
    pushed: int = 10


@dataclass(frozen=True)
class Target:
    """The server and its views. The directory `ledgers` contains the ledgers of the views. Only pushes change the first
    `pushed` documents of a view; only the exporter changes the other documents."""

    port: int
    grpc_port: int | None
    views: tuple[Dataset, ...]
    ledgers: Path
    pushed: int

    def is_ready(self) -> bool:
        """Return whether the server is ready."""
        try:
            Connection(self.port).ask("/ready")
        except (OSError, http.client.HTTPException, RuntimeError):
            return False
        return True

    def ledger(self, view: int) -> Ledger:
        """Return the ledger of the view with this number."""
        return Ledger(self.ledgers / f"ledger-{view}", self.views[view])


@dataclass
class Tally:
    """The results of the requests: the number and the latencies in seconds per kind, the numbers of failures and wrong
    answers, and a few examples of both."""

    requests: Counter[str] = field(default_factory=Counter)
    latencies: dict[str, list[float]] = field(default_factory=dict)
    failed: int = 0
    wrong: int = 0
    examples: list[str] = field(default_factory=list)


class Traffic:
    """The clients, in one thread each: the `Work` that `perf.beside` runs in a separate process."""

    def __init__(self, target: Target, load: Load, stop: threading.Event) -> None:
        self._target = target
        self._load = load
        self._stop = stop
        self._ledgers = [target.ledger(view) for view in range(len(target.views))]
        self._lock = threading.Lock()
        self._tally = Tally()
        self._newest = 0
        self.threads: list[Callable[[], None]] = [
            *[lambda: self._look_up(kept=True)] * load.kept,
            *[lambda: self._look_up(kept=False)] * load.fresh,
        ]
        if load.push_rate:
            self.threads.append(self._push)
        if load.scrape_rate:
            self.threads.append(self._scrape)
        if target.grpc_port is not None and load.grpc_rate:
            self.threads.append(self._call)

    def take(self) -> Tally:
        with self._lock:
            tally = self._tally
            self._tally = Tally()
            return tally

    def fail(self, why: str) -> None:
        with self._lock:
            self._tally.failed += 1
            self._example(why)

    def _example(self, what: str) -> None:
        if len(self._tally.examples) < _KEPT_EXAMPLES:
            self._tally.examples.append(what)

    def _note(self, kind: str, due: float, fault: str | None) -> None:
        latency = time.perf_counter() - due
        with self._lock:
            self._tally.requests[kind] += 1
            self._tally.latencies.setdefault(kind, []).append(latency)
            if fault is not None:
                self._tally.wrong += 1
                self._example(f"{kind}: {fault}")

    def _every(self, rate: float, act: Callable[[float], None]) -> None:
        """Call `act` at a steady rate, with the time at which the call was due. If `act` raises an exception, count a
        failure."""
        interval = 1 / rate
        due = time.perf_counter() + random.uniform(0, interval)
        while not self._stop.wait(max(0.0, due - time.perf_counter())):
            try:
                act(due)
            except Exception as error:
                self.fail(f"{type(error).__name__}: {str(error)[:_SHOWN_CHARACTERS]}")
            due += interval

    # --- lookups -----------------------------------------------------------------------------------------------

    def _look_up(self, *, kept: bool) -> None:
        source = np.random.default_rng()
        connection = Connection(self._target.port)
        kind = "lookup, kept connection" if kept else "lookup, new connection"
        count, rate = (self._load.kept, self._load.kept_rate) if kept else (self._load.fresh, self._load.fresh_rate)
        number = 0

        def act(due: float) -> None:
            nonlocal number
            number += 1
            way = answers.FORMATS[number % len(answers.FORMATS)]
            documents = self._some_documents(source)
            request = way.body(self._target.views, documents)
            newest = self._newest
            done = [ledger.done[documents] for ledger in self._ledgers]
            try:
                version, content = connection.ask(way.path, request, Accept=way.accept)
            finally:
                if not kept:
                    connection.close()
            fault = self._fault(documents, done, way.read(content), version, newest)
            self._note(kind, due, fault)

        self._every(rate / count, act)

    def _call(self) -> None:
        from perf.grpc_lookups import Channel  # gRPC's packages are an optional dependency.

        source = np.random.default_rng()
        channel = Channel(f"127.0.0.1:{self._target.grpc_port}")

        def act(due: float) -> None:
            documents = self._some_documents(source)
            newest = self._newest
            done = [ledger.done[documents] for ledger in self._ledgers]
            version, found = channel.look_up(self._target.views, documents)
            self._note("gRPC", due, self._fault(documents, done, found, version, newest))

        self._every(self._load.grpc_rate, act)

    def _some_documents(self, source: np.random.Generator) -> npt.NDArray[np.int64]:
        """Return random documents for a lookup. A fifth of them are from the pushed documents, and the others from
        all."""
        few = self._load.keys // 5
        parts = [source.integers(0, self._target.pushed, few)]
        parts.append(source.integers(0, self._target.views[0].rows, self._load.keys - few))
        return np.concatenate(parts)

    def _fault(
        self,
        documents: npt.NDArray[np.int64],
        done: Sequence[npt.NDArray[np.int64]],
        found: answers.Matrix,
        version: int,
        newest_before: int,
    ) -> str | None:
        with self._lock:
            self._newest = max(self._newest, version)
        if version < newest_before:
            return f"version {version} came after {newest_before} had been answered"
        column = 0
        for ledger, before in zip(self._ledgers, done, strict=True):
            features = ledger.data.features
            fault = ledger.fault(documents, found[:, column : column + features], before)
            if fault is not None:
                return fault
            column += features
        return None

    # --- the rest ----------------------------------------------------------------------------------------------

    def _push(self) -> None:
        connection = Connection(self._target.port)
        number = 0

        def act(due: float) -> None:
            nonlocal number
            number += 1
            ledger = self._ledgers[number % len(self._ledgers)]
            first = number // len(self._ledgers) * self._load.pushed
            documents = np.arange(first, first + self._load.pushed) % self._target.pushed
            ledger.begun[documents] += 1
            changes = ledger.begun[documents].copy()
            data = ledger.data
            columns = {f"f{n}": values(documents, n, changes).tolist() for n in range(data.features)}
            request = orjson.dumps({"view": data.view, "rows": {"doc_id": document_keys(documents), **columns}})
            identity = uuid.uuid4().hex
            connection.ask("/v1/push", request, **{"Idempotency-Key": identity})
            ledger.done[documents] = changes
            self._note("push", due, None)
            if number % 10 == 0:
                # Push again, like a client that lost the response.
                connection.ask("/v1/push", request, **{"Idempotency-Key": identity})

        self._every(self._load.push_rate, act)

    def _scrape(self) -> None:
        connection = Connection(self._target.port)

        def act(due: float) -> None:
            for path in ("/metrics", "/v1/status", "/ready"):
                connection.ask(path)
            self._note("scrape", due, None)

        self._every(self._load.scrape_rate, act)


class Connection:
    """A keep-alive connection. If the server has closed it, it is opened again for the next request."""

    def __init__(self, port: int) -> None:
        self._http = http.client.HTTPConnection("127.0.0.1", port, timeout=_PATIENCE_SECONDS)

    def ask(self, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        """Send a request, a POST if there is a body. Return the store version and the content of the response.

        Raises:
            RuntimeError: the status of the response is not 200.
            OSError, http.client.HTTPException: there was no response.
        """
        if self._http.sock is not None and select.select([self._http.sock], [], [], 0)[0]:
            self._http.close()
        try:
            self._http.request("GET" if body is None else "POST", path, body, headers)
            response = self._http.getresponse()
            content = response.read()
        except BaseException:
            self._http.close()
            raise
        if response.status != 200:
            raise RuntimeError(f"{path} was answered {response.status}: {content[:300]!r}")
        return int(response.headers.get("X-Shoal-Version", 0)), content

    def close(self) -> None:
        """Close the connection."""
        self._http.close()
