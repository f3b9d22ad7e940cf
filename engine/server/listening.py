"""The HTTP listening socket of all workers: a new one, or the one inherited from the previous server."""

import socket

from shoal.engine.base.errors import AddressUnusable
from shoal.engine.process.control import listen_unix
from shoal.engine.process.handover import Inheritance
from shoal.engine.server.settings import ServerSettings

_BACKLOG = 1024


def listen(settings: ServerSettings, inherited: Inheritance | None = None) -> socket.socket:
    """Return a non-blocking socket that listens on the address of the settings.

    Args:
        inherited: the sockets of the previous server. Its HTTP socket is used if this socket has the address of the
            settings.

    Raises:
        AddressUnusable: the server cannot listen on the address.
    """
    if inherited is not None:
        passed = socket.socket(fileno=inherited.http)
        if _is_where(passed, inherited.address, settings):
            passed.setblocking(False)
            return passed
        passed.close()
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


def http_address(listener: socket.socket, settings: ServerSettings) -> str:
    """Return the address of a server: an http:// or https:// address, or unix: and a path."""
    if settings.unix_socket is not None:
        return f"unix:{settings.unix_socket}"
    scheme = "http" if settings.tls_certificate is None else "https"
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def is_bound_to(bound: socket.socket, host: str, port: int) -> bool:
    """Return whether a TCP socket is bound to a host and port; if `port` is 0, to any port of the host."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError:
        return False
    return bound.family == family and bound.getsockname()[0] == address[0] and port in (0, bound.getsockname()[1])


def _is_where(passed: socket.socket, address: str, settings: ServerSettings) -> bool:
    if settings.unix_socket is not None:
        return address == f"unix:{settings.unix_socket}"
    return is_bound_to(passed, settings.host, settings.port)
