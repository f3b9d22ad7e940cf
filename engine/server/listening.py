"""The socket that all workers accept connections for HTTP from: made, or taken over from the server before."""

import socket

from engine.control import listen_unix
from engine.errors import AddressUnusable
from engine.handover import Inheritance
from engine.settings import ServerSettings

_BACKLOG = 1024


def listen(settings: ServerSettings, inherited: Inheritance | None = None) -> socket.socket:
    """A non-blocking socket that listens where the settings say: what is inherited if it does.

    Raises:
        AddressUnusable: it cannot be listened on.
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


def address_of(listener: socket.socket, settings: ServerSettings) -> str:
    """Where a server listens: an http:// or https:// address, or unix: and a path."""
    if settings.unix_socket is not None:
        return f"unix:{settings.unix_socket}"
    scheme = "http" if settings.tls_certificate is None else "https"
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def is_bound_to(bound: socket.socket, host: str, port: int) -> bool:
    """Whether a TCP socket is bound to an address, or to any port of its host if that is 0."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError:
        return False
    return bound.family == family and bound.getsockname()[0] == address[0] and port in (0, bound.getsockname()[1])


def _is_where(passed: socket.socket, address: str, settings: ServerSettings) -> bool:
    if settings.unix_socket is not None:
        return address == f"unix:{settings.unix_socket}"
    return is_bound_to(passed, settings.host, settings.port)
