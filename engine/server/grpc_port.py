"""The port on which all workers answer gRPC, held for them before there are any.

A gRPC server makes its listening sockets itself, so that the workers cannot share one as they do for HTTP: each listens
on the port for itself, with SO_REUSEPORT, and the kernel gives each a part of the connections. That option would let
another server in as well. So the supervisor binds the port alone first, which fails if anybody has it, and only then
opens it to sockets of the same user that have the option too.
"""

import importlib.util
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from engine.errors import AddressUnusable, GrpcMissing
from engine.server.listening import is_bound_to
from engine.settings import ServerSettings

_PACKAGES = ("grpc", "grpc_health", "google.protobuf")


@contextmanager
def reserve_port(settings: ServerSettings, inherited: int | None = None) -> Iterator[socket.socket | None]:
    """Hold the port for gRPC, and yield what holds it; None if the settings name no port. The
    descriptor of what held it for the server before is taken if that is the port that the settings name.

    Raises:
        AddressUnusable: the address cannot be listened on.
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


def address_of(holder: socket.socket) -> str:
    """The address for workers to listen on."""
    host, port = holder.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _check_packages() -> None:
    """Look for the packages without importing them, which is for the workers to do."""
    for package in _PACKAGES:
        try:
            found = importlib.util.find_spec(package) is not None
        except ModuleNotFoundError:
            found = False  # Not even the package that it would be in is there.
        if not found:
            raise GrpcMissing(f"gRPC needs the package {package}; install it: pip install 'shoal[grpc]'")


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        holder = socket.socket(family, kind, protocol)
        try:
            # Connections of an earlier server that wait for their end are no reason to refuse ...
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind(address)
            # ... but this option must not let another server share the address that nobody listens on yet.
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        except OSError:
            holder.close()
            raise
    except OSError as error:
        raise AddressUnusable(f"cannot listen for gRPC on {host}:{port}: {error}; give another port") from error
    return holder
