"""The server: a supervisor, its workers, which answer HTTP and gRPC, and a writer if the caller has one."""

import logging
import os
import socket
import sys
from collections.abc import Callable
from functools import partial

from engine.control import listen_unix
from engine.errors import AddressUnusable
from engine.failpoints import reached
from engine.kernels import warm
from engine.run_directory import clear_metrics, serving
from engine.server.grpc_port import reserve_port
from engine.server.protection import Protection, warn_of_gaps
from engine.settings import ServerSettings
from engine.supervisor import Supervisor

log = logging.getLogger("shoal.supervisor")

_BACKLOG = 1024


def run(settings: ServerSettings, writer: Callable[[], None] | None = None) -> None:
    """Serve a store until SIGTERM or SIGINT; the store need not exist yet.

    Args:
        settings: see `engine.settings`.
        writer: main function of the writer process, which is to end on SIGTERM.

    Raises:
        AddressUnusable: an address cannot be listened on.
        GrpcMissing: the settings ask for gRPC, and its packages are not installed.
        ServerRunning: the store is served already.
        SettingsInvalid: tokens, a certificate or a key are not what they should be.
    """
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s[%(process)d] %(message)s",
    )
    protection = Protection(settings)
    warn_of_gaps(settings)
    with serving(settings.store), _listen(settings) as listener, reserve_port(settings) as grpc_address:
        reached("server.bound")
        address = _address_of(listener, settings)
        directory = clear_metrics(settings.store)
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(directory)
        # Only now, since prometheus_client decides at its import whether counters are shared between processes.
        from prometheus_client.multiprocess import mark_process_dead

        from engine.server.accepting import ConnectionCounts
        from engine.server.worker import work

        warm()
        supervisor = Supervisor(
            settings.store,
            listener,
            address,
            workers=settings.workers,
            work=partial(work, settings, protection, listener, grpc_address, ConnectionCounts(settings.workers)),
            write=writer,
            silent_seconds=settings.silent_seconds,
            drain_seconds=settings.drain_seconds,
            refresh=protection.refresh,
            bury=partial(mark_process_dead, path=str(directory)),
        )
        log.info("listening on %s", address)
        if grpc_address is not None:
            log.info("listening for gRPC on %s", grpc_address)
        try:
            supervisor.run()
        finally:
            if settings.unix_socket is not None:
                settings.unix_socket.unlink(missing_ok=True)


def _listen(settings: ServerSettings) -> socket.socket:
    if settings.unix_socket is not None:
        return listen_unix(settings.unix_socket)
    try:
        family, _, _, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        raise AddressUnusable(
            f"cannot listen on {settings.host}:{settings.port}: {error}; give another host or port"
        ) from error
    listener.setblocking(False)
    return listener


def _address_of(listener: socket.socket, settings: ServerSettings) -> str:
    if settings.unix_socket is not None:
        return f"unix:{settings.unix_socket}"
    scheme = "http" if settings.tls_certificate is None else "https"
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
