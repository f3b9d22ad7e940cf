"""Addresses of servers: `http://HOST:PORT`, `https://HOST:PORT`, or `unix:PATH`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from shoal.client.errors import AddressInvalid
from shoal.client.quoting import abbreviated

_PORTS = {"http": 80, "https": 443}
_MEND = "write http://HOST:PORT, https://HOST:PORT or unix:PATH"


@dataclass(frozen=True)
class Address:
    """The address of a server. `path` is the path of its Unix socket; None for TCP."""

    text: str
    host: str
    port: int
    tls: bool = False
    path: str | None = None

    @property
    def host_header(self) -> str:
        """The value of the Host header in requests."""
        if self.path is not None:
            return "localhost"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS["https" if self.tls else "http"] else f"{host}:{self.port}"


def read_addresses(addresses: Any, shards: Any) -> Sequence[Sequence[str]]:
    """Return one list of replica addresses for each shard; without shards, return a single list. Raise AddressInvalid
    if the arguments are invalid."""
    if (addresses is None) == (shards is None):
        raise AddressInvalid("give either the addresses of servers, or shards: one list of addresses per shard")
    listed = [addresses] if shards is None else shards
    if not isinstance(listed, list | tuple):
        raise AddressInvalid(f"shards is {abbreviated(shards)}; give a list with the addresses of each shard")
    of_shards = [[replicas] if isinstance(replicas, str) else replicas for replicas in listed]
    for replicas in of_shards:
        if not isinstance(replicas, list | tuple) or not all(isinstance(text, str) for text in replicas):
            raise AddressInvalid(f"{abbreviated(replicas)} is neither an address nor a list of addresses; {_MEND}")
    every = [text for replicas in of_shards for text in replicas]
    if not all(of_shards) or not every or len(set(every)) < len(every):
        raise AddressInvalid(f"give each address once, and at least one per shard; found {', '.join(every) or 'none'}")
    return of_shards


def parse_address(text: str) -> Address:
    """Parse an address; raise AddressInvalid if the text is not an address."""
    if text.startswith("unix:") and len(text) > len("unix:") and "\0" not in text:
        return Address(text, "localhost", 0, path=text.removeprefix("unix:"))
    # `urlsplit` silently removes line breaks and tabs.
    if not text.isascii() or not text.isprintable() or " " in text:
        raise AddressInvalid(f"{text!r} has characters that an address cannot have; {_MEND}, with a host name in ASCII")
    try:
        parts = urlsplit(text)
        port = parts.port
        host = (parts.hostname or "").encode("idna")
    except ValueError as error:
        raise AddressInvalid(f"{text!r} is not an address: {error}; {_MEND}") from None
    has_more = parts.path not in ("", "/") or parts.query or parts.fragment or "@" in parts.netloc
    if parts.scheme not in _PORTS or not host or port == 0 or has_more:
        raise AddressInvalid(f"{text!r} is not the address of a server; {_MEND}")
    return Address(
        text.rstrip("/"), host.decode(), _PORTS[parts.scheme] if port is None else port, tls=parts.scheme == "https"
    )
