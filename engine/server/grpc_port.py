"""Reserve the port on which all workers answer gRPC, before the workers are forked.

A gRPC server creates its own listening sockets, so the workers cannot share one socket as they do for HTTP. Instead,
each worker listens on the port with SO_REUSEPORT, and the kernel spreads the connections over them. That option would
also let another server share the port. So the supervisor first binds the port without the option, which fails if the
port is in use. Then the supervisor sets the option. From then on, other sockets of the same user may share the port if
they have the option, too.
"""

import importlib.util
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from shoal.engine.base.errors import AddressUnusable, GrpcMissing
from shoal.engine.server.listening import is_bound_to
from shoal.engine.server.settings import ServerSettings

_PACKAGES = ("grpc", "grpc_health", "google.protobuf")


@contextmanager
def reserve_port(settings: ServerSettings, inherited: int | None = None) -> Iterator[socket.socket | None]:
    """Reserve the gRPC port, and yield the socket that holds it; yield None if the settings name no port.

    Args:
        inherited: the descriptor of the previous server's socket. That socket is used if it holds the port of the
            settings.

    Raises:
        AddressUnusable: the server cannot listen on the address.
        GrpcMissing: the packages for gRPC are not installed.
    """
    passed = socket.socket(fileno=inherited) if inherited is not None else None
    if settings.grpc_port is None:
        yield None
        return
    _check_packages()
    if passed is None or not is_bound_to(passed, settings.host, settings.grpc_port):
        passed = _bind(settings.host, settings.grpc_port)
    with passed:
        yield passed


def grpc_address(holder: socket.socket) -> str:
    """Return the address for the workers to listen on."""
    host, port = holder.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _check_packages() -> None:
    """Raise GrpcMissing if a package is not installed. The packages are not imported: only workers import them."""
    for package in _PACKAGES:
        try:
            found = importlib.util.find_spec(package) is not None
        except ModuleNotFoundError:
            found = False  # Its parent package is missing too.
        if not found:
            raise GrpcMissing(f"gRPC needs the package {package}; install it: pip install 'shoal[grpc]'")


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        holder = socket.socket(family, kind, protocol)
        try:
            # Connections of an earlier server in TIME_WAIT must not block the port ...
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind(address)
            # ... but until a worker listens, this option would let another server share the address.
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        except OSError:
            holder.close()
            raise
    except OSError as error:
        raise AddressUnusable(f"cannot listen for gRPC on {host}:{port}: {error}; give another port") from error
    return holder
