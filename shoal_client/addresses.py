"""Addresses of servers: `http://HOST:PORT`, `https://HOST:PORT`, or `unix:PATH`."""

from dataclasses import dataclass
from urllib.parse import urlsplit

from shoal_client.errors import AddressInvalid

_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Address:
    """Where a server listens; `path` is that of its Unix socket, if it is one."""

    text: str
    host: str
    port: int
    tls: bool = False
    path: str | None = None

    @property
    def host_header(self) -> str:
        """What requests name in their Host header."""
        if self.path is not None:
            return "localhost"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS["https" if self.tls else "http"] else f"{host}:{self.port}"


def parse_address(text: str) -> Address:
    """The address in a text; raises AddressInvalid."""
    mend = "write http://HOST:PORT, https://HOST:PORT or unix:PATH"
    if text.startswith("unix:") and len(text) > len("unix:"):
        return Address(text, "localhost", 0, path=text.removeprefix("unix:"))
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise AddressInvalid(f"{text!r} is no address: {error}; {mend}") from None
    if parts.scheme not in _PORTS or not parts.hostname or parts.path not in ("", "/") or parts.query or parts.username:
        raise AddressInvalid(f"{text!r} is no address of a server; {mend}")
    tls = parts.scheme == "https"
    return Address(text.rstrip("/"), parts.hostname, port or _PORTS[parts.scheme], tls)
