"""One worker process: its event loop, its part of the connections, its signs of life, and its end."""

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

from engine.control import WriterClient
from engine.errors import ProcessIdTaken, StoreNotFound
from engine.failpoints import reached
from engine.malloc import keep_freed_memory
from engine.run_directory import metrics_path
from engine.server.accepting import Acceptor, ConnectionCounts
from engine.server.admission import Admission
from engine.server.app import Application
from engine.server.connections import ConnectionServer
from engine.server.metrics import Metrics
from engine.server.metrics_files import MetricsFiles
from engine.server.outgoing import Outgoing
from engine.server.protection import Protection
from engine.server.readiness import Readiness
from engine.server.served_store import ServedStore
from engine.server.served_tables import ServedTables
from engine.settings import ServerSettings

if TYPE_CHECKING:
    from engine.server.grpc_server import GrpcServer

log = logging.getLogger("shoal.worker")

_REFRESH_SECONDS = 1.0
_DRAIN_POLL_SECONDS = 0.02
_FAREWELL_SECONDS = 2.0
_SWITCH_SECONDS = 0.0005
_SUCCESSION_SECONDS = 15.0


class Worker:
    """What every worker is made of, before the fork: `work` is the main function of each.

    Args:
        counts: where the workers note how many connections each has.
        has_writer: whether pushes that find no writer may wait for the next one.
        follows: whether that follows an export root.
    """

    def __init__(
        self,
        settings: ServerSettings,
        protection: Protection,
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
        """Serve until SIGTERM, then finish what is under way.

        Args:
            place: the worker's among all.
            beat: to be called every second as a sign of life, and as soon as requests are answered.
            on_trial: another server still serves the store, and goes on if this worker cannot.

        Raises:
            ShoalError: the worker is on trial, and cannot read the store.
        """
        reached("worker.begun")
        keep_freed_memory()
        # The event loop must not wait long for the interpreter's lock while a large answer is encoded.
        sys.setswitchinterval(_SWITCH_SECONDS)
        asyncio.set_event_loop_policy(None)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve(place, beat, on_trial))

    async def _serve(self, place: int, beat: Callable[[], None], on_trial: bool) -> None:
        settings, protection = self._settings, self._protection
        patience = _SUCCESSION_SECONDS if self._has_writer else 0.0
        async with WriterClient(settings.store, patience=patience) as writer:
            stop = asyncio.Event()
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
            metrics_files = MetricsFiles(metrics_path(settings.store))
            served = ServedStore(settings.store, Readiness(settings, follows=self._follows))
            metrics = Metrics(settings.store, metrics_files)
            tables = ServedTables(settings, served, metrics)
            outgoing = Outgoing(settings)
            application = Application(settings, protection, served, metrics, writer, tables, outgoing)
            server = application.server(self._counts, place)
            runner = web.ServerRunner(server)
            await runner.setup()
            served.refresh()
            reached("worker.opened")
            if on_trial:
                _check_readable(served)
            rpcs = None
            if self._grpc_address is not None:
                rpcs = await _serve_grpc(settings, protection, served, metrics, tables, outgoing, self._grpc_address)
            await tables.prepare()
            # Whatever is there by now stays: a full collection that looks through it holds up requests for a tenth of a
            # second.
            gc.collect()
            gc.freeze()
            look_after = partial(_look_after, server, application.admission, metrics, self._counts, place)
            keeping_up = asyncio.create_task(_keep_up(protection, served, metrics, rpcs, tables, look_after, beat))
            reached("worker.accepting")
            # Last of all: who connects to a worker that fails after this gets no answer.
            most, tls = settings.max_connections, protection.context
            acceptor = Acceptor(self._listener, server, self._counts, place, most, tls)
            await stop.wait()
            application.admission.is_draining = True
            acceptor.close()
            stopping_rpcs = asyncio.create_task(rpcs.stop()) if rpcs is not None else None
            # aiohttp drops what arrives on a connection once it closes it, so that a body still on its way must come
            # first. How long that may take is the supervisor's to say.
            #
            # A client that sends a request just when its connection is closed cannot tell whether it arrived. So each
            # is told with its next answer, and only one that has long been silent is closed without.
            closing_at = time.monotonic() + min(_FAREWELL_SECONDS, settings.drain_seconds)
            while application.in_flight or (self._counts[place] > 0 and time.monotonic() < closing_at):
                await asyncio.sleep(_DRAIN_POLL_SECONDS)
            await runner.cleanup()
            if stopping_rpcs is not None:
                await stopping_rpcs
            await tables.close()
            outgoing.close()
            keeping_up.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await keeping_up


def _check_readable(served: ServedStore) -> None:
    """Raise what keeps a store from being served, but for one into which nothing was loaded yet."""
    with contextlib.suppress(StoreNotFound):
        served.open()


async def _serve_grpc(
    settings: ServerSettings,
    protection: Protection,
    served: ServedStore,
    metrics: Metrics,
    tables: ServedTables,
    outgoing: Outgoing,
    address: str,
) -> "GrpcServer":
    # Only here: its packages are an extra, and are not to be loaded in a process that forks.
    from engine.server.grpc_server import GrpcServer

    server = GrpcServer(settings, protection, served, metrics, tables, outgoing)
    await server.start(address)
    return server


async def _keep_up(
    protection: Protection,
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
            log.warning("the worker ends, and starts again under another process id: %s", error)
            signal.raise_signal(signal.SIGTERM)
        except Exception:
            log.exception("the worker cannot keep up with what changed")
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
