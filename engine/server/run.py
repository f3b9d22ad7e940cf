"""Start a server: a supervisor process, workers that answer HTTP and gRPC, and an optional writer process."""

import logging
import os
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from shoal.engine.base.failpoints import reached
from shoal.engine.kernels import warm
from shoal.engine.process.handover import Inheritance, Predecessor, Takeover
from shoal.engine.process.run_directory import (
    RunDirectoryKeeper,
    clear_metrics,
    metrics_path,
    serving,
)
from shoal.engine.process.supervisor import Supervisor
from shoal.engine.server import grpc_port
from shoal.engine.server.descriptors import fit_connections
from shoal.engine.server.listening import http_address, listen
from shoal.engine.server.protection import Auth, warn_of_gaps
from shoal.engine.server.settings import ServerSettings
from shoal.engine.status.replication import forget_old_replication
from shoal.engine.store.environment import check_address_space

log = logging.getLogger("shoal.supervisor")


def run(
    settings: ServerSettings,
    writer: Callable[[], None] | None = None,
    *,
    follows: bool = False,
    warm_writer: Callable[[], None] | None = None,
) -> None:
    """Serve a store until SIGTERM or SIGINT; the store need not exist yet.

    Args:
        settings: see `shoal.engine.server.settings`.
        writer: the main function of the writer process; it must end on SIGTERM.
        follows: whether the writer follows an export root. The server is then ready only once it has caught up.
        warm_writer: a function that compiles the writer's code; it is called once, before the first fork.

    Raises:
        AddressUnusable: the server cannot listen on an address.
        GrpcMissing: the settings ask for gRPC, and its packages are not installed.
        ReplacementFailed: the server could not replace the running server, which continues to serve.
        ServerRunning: another server already serves the store.
        SettingsInvalid: the tokens, the certificate or the key are invalid.
    """
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s[%(process)d] %(message)s",
    )
    check_address_space()
    auth = Auth(settings)
    warn_of_gaps(settings)
    settings = fit_connections(settings)
    with ExitStack() as closing:
        place = _take_place(settings, closing)
        reached("server.bound")
        metrics = _share_metrics(settings.store, is_new=place.predecessor is None)
        warm()
        if warm_writer is not None:
            warm_writer()
        supervisor = _supervisor(settings, auth, place, metrics, writer, follows=follows)
        log.info("listening on %s", place.address)
        if place.grpc_address is not None:
            log.info("listening for gRPC on %s", place.grpc_address)
        try:
            supervisor.run()
        finally:
            if settings.unix_socket is not None and supervisor.serves:
                settings.unix_socket.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Place:
    """The lock and the sockets of a server, which a successor inherits."""

    lock: int
    listener: socket.socket
    address: str
    grpc_holder: socket.socket | None
    grpc_address: str | None
    predecessor: Predecessor | None


def _take_place(settings: ServerSettings, closing: ExitStack) -> _Place:
    """Take the store's lock and open the sockets, or inherit the lock and the sockets from the server to replace."""
    predecessor = Predecessor.find(settings.store) if settings.replace else None
    inherited = predecessor.inheritance if predecessor is not None else None
    lock = closing.enter_context(serving(settings.store, inherited.lock if inherited is not None else None))
    listener = closing.enter_context(listen(settings, inherited))
    holder = closing.enter_context(grpc_port.reserve_port(settings, inherited.grpc if inherited is not None else None))
    return _Place(
        lock=lock,
        listener=listener,
        address=http_address(listener, settings),
        grpc_holder=holder,
        grpc_address=grpc_port.grpc_address(holder) if holder is not None else None,
        predecessor=predecessor,
    )


def _share_metrics(store: Path, *, is_new: bool) -> Path:
    """Return the directory in which the processes share their counters. Also pass this directory to prometheus_client.

    A replaced server's counters are kept, because its workers write to them until they end.
    """
    if is_new:
        forget_old_replication(store)
    directory = clear_metrics(store) if is_new else metrics_path(store)
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(directory)
    return directory


def _supervisor(
    settings: ServerSettings,
    auth: Auth,
    place: _Place,
    metrics: Path,
    writer: Callable[[], None] | None,
    *,
    follows: bool,
) -> Supervisor:
    # Import after `_share_metrics`: prometheus_client decides at import whether processes share counters.
    from shoal.engine.server.accepting import ConnectionCounts
    from shoal.engine.server.metrics_files import forget_process
    from shoal.engine.server.worker import Worker

    has_writer = writer is not None
    worker = Worker(
        settings,
        auth,
        place.listener,
        place.grpc_address,
        ConnectionCounts(settings.workers),
        has_writer=has_writer,
        follows=follows,
    )
    grpc = place.grpc_holder.fileno() if place.grpc_holder is not None else None
    predecessor = place.predecessor
    return Supervisor(
        settings.store,
        place.listener,
        Inheritance(place.address, place.lock, place.listener.fileno(), grpc),
        workers=settings.workers,
        work=worker.work,
        write=writer,
        takeover=Takeover(predecessor, with_writer=has_writer) if predecessor is not None else None,
        silent_seconds=settings.silent_seconds,
        drain_seconds=settings.drain_seconds,
        keeper=RunDirectoryKeeper(settings.store, place.lock),
        refresh=auth.refresh,
        forget_worker=partial(forget_process, metrics),
    )
