"""The server: a supervisor, its workers, which answer HTTP and gRPC, and a writer if the caller has one."""

import logging
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from engine.environment import check_address_space
from engine.failpoints import reached
from engine.handover import Inheritance, Predecessor, Takeover
from engine.kernels import warm
from engine.run_directory import RunDirectoryKeeper, clear_metrics, metrics_path, serving
from engine.server import grpc_port
from engine.server.descriptors import fit_connections
from engine.server.listening import address_of, listen
from engine.server.protection import Protection, warn_of_gaps
from engine.settings import ServerSettings
from engine.standing import forget_old_standing
from engine.supervisor import Supervisor

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
        settings: see `engine.settings`.
        writer: main function of the writer process, which is to end on SIGTERM.
        follows: whether it follows an export root, which the server then has to have caught up with to be ready.
        warm_writer: compiles what the writer runs; it is called once, before any process is forked.

    Raises:
        AddressUnusable: an address cannot be listened on.
        GrpcMissing: the settings ask for gRPC, and its packages are not installed.
        ReplacementFailed: it was to take another server's place, which goes on.
        ServerRunning: the store is served already.
        SettingsInvalid: tokens, a certificate or a key are not what they should be.
    """
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s[%(process)d] %(message)s",
    )
    check_address_space()
    protection = Protection(settings)
    warn_of_gaps(settings)
    settings = fit_connections(settings)
    with ExitStack() as closing:
        predecessor = Predecessor.find(settings.store) if settings.replace else None
        inherited = predecessor.inheritance if predecessor is not None else None
        lock = closing.enter_context(serving(settings.store, inherited.lock if inherited is not None else None))
        listener = closing.enter_context(listen(settings, inherited))
        grpc_holder = closing.enter_context(
            grpc_port.reserve_port(settings, inherited.grpc if inherited is not None else None)
        )
        reached("server.bound")
        address = address_of(listener, settings)
        grpc_address = grpc_port.address_of(grpc_holder) if grpc_holder is not None else None
        # Of a server that is replaced the counters go on: its workers count there until they are gone.
        if predecessor is None:
            forget_old_standing(settings.store)
        directory = clear_metrics(settings.store) if predecessor is None else metrics_path(settings.store)
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(directory)
        # Only now, since prometheus_client decides at its import whether counters are shared between processes.
        from engine.server.accepting import ConnectionCounts
        from engine.server.metrics_files import forget_process
        from engine.server.worker import Worker

        warm()
        if warm_writer is not None:
            warm_writer()
        worker = Worker(
            settings,
            protection,
            listener,
            grpc_address,
            ConnectionCounts(settings.workers),
            has_writer=writer is not None,
            follows=follows,
        )
        supervisor = Supervisor(
            settings.store,
            listener,
            Inheritance(address, lock, listener.fileno(), grpc_holder.fileno() if grpc_holder is not None else None),
            workers=settings.workers,
            work=worker.work,
            write=writer,
            takeover=Takeover(predecessor, with_writer=writer is not None) if predecessor is not None else None,
            silent_seconds=settings.silent_seconds,
            drain_seconds=settings.drain_seconds,
            keeper=RunDirectoryKeeper(settings.store, lock),
            refresh=protection.refresh,
            bury=partial(forget_process, directory),
        )
        log.info("listening on %s", address)
        if grpc_address is not None:
            log.info("listening for gRPC on %s", grpc_address)
        try:
            supervisor.run()
        finally:
            if settings.unix_socket is not None and supervisor.serves:
                settings.unix_socket.unlink(missing_ok=True)
