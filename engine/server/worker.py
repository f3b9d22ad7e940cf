"""One worker process: its event loop, its share of the connections, its heartbeats, and its shutdown."""

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import uvloop
from aiohttp import web

from shoal.engine.base.errors import ProcessIdTaken, StoreNotFound
from shoal.engine.base.failpoints import reached
from shoal.engine.process.control import WriterClient
from shoal.engine.process.malloc import keep_freed_memory
from shoal.engine.process.run_directory import metrics_path
from shoal.engine.server.accepting import Acceptor, ConnectionCounts
from shoal.engine.server.admission import Admission
from shoal.engine.server.app import Application
from shoal.engine.server.connections import ConnectionServer
from shoal.engine.server.metrics import Metrics
from shoal.engine.server.metrics_files import MetricsFiles
from shoal.engine.server.outgoing import Outgoing
from shoal.engine.server.protection import Auth
from shoal.engine.server.readiness import Readiness
from shoal.engine.server.served_store import ServedStore
from shoal.engine.server.served_tables import ServedTables
from shoal.engine.server.settings import ServerSettings

if TYPE_CHECKING:
    from shoal.engine.server.grpc_server import GrpcServer

log = logging.getLogger("shoal.worker")

_REFRESH_SECONDS = 1.0
_DRAIN_POLL_SECONDS = 0.02
_FAREWELL_SECONDS = 2.0
_SWITCH_SECONDS = 0.0005
_SUCCESSION_SECONDS = 15.0


class Worker:
    """The common state of all workers, created before the fork; `work` is the main function of each worker.

    Args:
        counts: the connection counts of all workers.
        has_writer: whether the server has a writer. Pushes then wait for the next writer if none answers.
        follows: whether the writer follows an export root.
    """

    def __init__(
        self,
        settings: ServerSettings,
        protection: Auth,
        listener: socket.socket,
        grpc_address: str | None,
        counts: ConnectionCounts,
        *,
        has_writer: bool,
        follows: bool,
    ) -> None:
        self._settings = settings
        self._protection = protection
        self._listener = listener
        self._grpc_address = grpc_address
        self._counts = counts
        self._has_writer = has_writer
        self._follows = follows

    def work(self, place: int, beat: Callable[[], None], on_trial: bool) -> None:
        """Serve until SIGTERM, then finish the current requests.

        Args:
            place: the index of this worker among all workers.
            beat: a function that sends a heartbeat. It is called every second, first when requests can be answered.
            on_trial: whether another server still serves the store. That server continues to serve if this worker
                fails.

        Raises:
            ShoalError: the worker cannot read the store, and `on_trial` is true.
        """
        reached("worker.begun")
        keep_freed_memory()
        # The event loop must not wait long for the interpreter's lock while a large answer is encoded.
        sys.setswitchinterval(_SWITCH_SECONDS)
        asyncio.set_event_loop_policy(None)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve(place, beat, on_trial))

    async def _serve(self, place: int, beat: Callable[[], None], on_trial: bool) -> None:
        patience = _SUCCESSION_SECONDS if self._has_writer else 0.0
        async with WriterClient(self._settings.store, patience=patience) as writer:
            stop = asyncio.Event()
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
            serving = _Serving(self._settings, self._protection, self._counts, place, writer, follows=self._follows)
            await serving.open(on_trial=on_trial)
            if self._grpc_address is not None:
                await serving.start_grpc(self._grpc_address)
            await serving.tables.prepare()
            _freeze_objects()
            serving.keep_up(beat)
            reached("worker.accepting")
            # Accept connections only as the last step. If a later step could fail, clients that are already connected
            # would get no answer.
            serving.accept(self._listener)
            await stop.wait()
            await serving.drain()
            await serving.close()


class _Serving:
    """The parts of a worker that serves, in the order of their start: open, accept, drain, close."""

    def __init__(
        self,
        settings: ServerSettings,
        protection: Auth,
        counts: ConnectionCounts,
        place: int,
        writer: WriterClient,
        *,
        follows: bool,
    ) -> None:
        self._settings = settings
        self._protection = protection
        self._counts = counts
        self._place = place
        self._served = ServedStore(settings.store, Readiness(settings, follows=follows))
        self._metrics = Metrics(settings.store, MetricsFiles(metrics_path(settings.store)))
        self.tables = ServedTables(settings, self._served, self._metrics)
        self._outgoing = Outgoing(settings)
        self._application = Application(
            settings, protection, self._served, self._metrics, writer, self.tables, self._outgoing
        )
        self._server = self._application.server(counts, place)
        self._runner = web.ServerRunner(self._server)
        self._rpcs: GrpcServer | None = None
        self._acceptor: Acceptor | None = None
        self._keeping_up: asyncio.Task[None] | None = None

    async def open(self, *, on_trial: bool) -> None:
        """Open the store. If `on_trial` is true, raise an error if the store cannot be served."""
        await self._runner.setup()
        self._served.refresh()
        reached("worker.opened")
        if on_trial:
            _check_readable(self._served)

    async def start_grpc(self, address: str) -> None:
        """Serve gRPC, too."""
        # Imported only here: gRPC's packages are optional, and must not be loaded in a process that forks.
        from shoal.engine.server.grpc_server import GrpcServer

        self._rpcs = GrpcServer(
            self._settings, self._protection, self._served, self._metrics, self.tables, self._outgoing
        )
        await self._rpcs.start(address)

    def keep_up(self, beat: Callable[[], None]) -> None:
        """Start the task that follows new versions, and sends heartbeats."""
        look_after = partial(
            _look_after, self._server, self._application.admission, self._metrics, self._counts, self._place
        )
        self._keeping_up = asyncio.create_task(
            _keep_up(self._protection, self._served, self._metrics, self._rpcs, self.tables, look_after, beat)
        )

    def accept(self, listener: socket.socket) -> None:
        """Accept connections from now on."""
        most = self._settings.max_connections
        self._acceptor = Acceptor(listener, self._server, self._counts, self._place, most, self._protection.context)

    async def drain(self) -> None:
        """Accept no more connections, and finish the current requests.

        First wait until all current requests are answered, because aiohttp drops the rest of a request's body when it
        closes the connection. The supervisor limits this wait. Then wait for the connections to close, up to a limit.
        If the server closes a connection at the moment when a client sends a request, this client cannot tell whether
        the request arrived. So the next answer on each connection tells the client to close the connection. The server
        closes only connections without a further request.
        """
        self._application.admission.is_draining = True
        if self._acceptor is not None:
            self._acceptor.close()
        stopping_rpcs = asyncio.create_task(self._rpcs.stop()) if self._rpcs is not None else None
        closing_at = time.monotonic() + min(_FAREWELL_SECONDS, self._settings.drain_seconds)
        while self._application.in_flight or (self._counts[self._place] > 0 and time.monotonic() < closing_at):
            await asyncio.sleep(_DRAIN_POLL_SECONDS)
        await self._runner.cleanup()
        if stopping_rpcs is not None:
            await stopping_rpcs

    async def close(self) -> None:
        """Release what `open` and `keep_up` took."""
        await self.tables.close()
        self._outgoing.close()
        if self._keeping_up is not None:
            self._keeping_up.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeping_up


def _freeze_objects() -> None:
    """Exclude the current objects from garbage collection. They live as long as the process, and a full collection that
    scans them would block requests for a tenth of a second."""
    gc.collect()
    gc.freeze()


def _check_readable(served: ServedStore) -> None:
    """Raise an error if the store cannot be served. Do not raise StoreNotFound, because a store without data is
    allowed."""
    with contextlib.suppress(StoreNotFound):
        served.open()


async def _keep_up(
    protection: Auth,
    served: ServedStore,
    metrics: Metrics,
    rpcs: "GrpcServer | None",
    tables: ServedTables,
    look_after: Callable[[float], None],
    beat: Callable[[], None],
) -> None:
    loop = asyncio.get_running_loop()
    lag = 0.0
    while True:
        beat()
        try:
            protection.refresh()
            served.refresh()
            metrics.mend_files()
            metrics.set_version(served.version())
            await tables.prepare()
            look_after(lag)
            if rpcs is not None:
                rpcs.end_overdue()
                await rpcs.show_health()
        except ProcessIdTaken as error:
            log.warning("the worker restarts under another process id: %s", error)
            signal.raise_signal(signal.SIGTERM)
        except Exception:
            log.exception("the worker failed to refresh its state; it tries again in a second")
        due = loop.time() + _REFRESH_SECONDS
        await asyncio.sleep(_REFRESH_SECONDS)
        lag = max(0.0, loop.time() - due)


def _look_after(
    server: ConnectionServer,
    admission: Admission,
    metrics: Metrics,
    counts: ConnectionCounts,
    place: int,
    lag: float,
) -> None:
    if refused := admission.take_refused():
        metrics.count_shed("waited", refused)
    if ended := server.end_overdue():
        metrics.count_shed("slow", ended)
    if closed := server.take_closed_idle():
        metrics.count_shed("idle", closed)
    metrics.set_load(lag, counts[place])
