"""What a client may be told, and what it takes where it is told nothing; checked once."""

import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from shoal_client.calls import Hedge
from shoal_client.errors import AddressInvalid, RequestInvalid
from shoal_client.replicas import Limits

LONGEST_SECONDS = 86_400
"""What servers take as a client's deadline at most."""


class Settings(TypedDict, total=False):
    """What a client may be told besides addresses. Times are in seconds.

    `token` is sent with each request. `tls` is what the servers' certificates are checked against, and the client's
    own; the system's if not given. `timeout`, 1.0, is how long an operation may take, `connect_timeout`, 0.25, how long
    a connection may take to come about. A request is sent `max_tries`, 3, times at most, hedges included. After `hedge`
    a lookup goes to a second replica too: seconds, "p95" for the time in which 95% of answers come, or None, the
    default. `limits` say how much may be repeated. `max_skew`, 0, is by how many entries of a view's log shards may
    differ in an answer.
    """

    token: str | None
    tls: ssl.SSLContext | None
    timeout: float
    connect_timeout: float
    max_tries: int
    hedge: Hedge
    limits: Limits
    max_skew: int


@dataclass(frozen=True)
class Options:
    """Settings with their defaults. `shards` are the addresses of each shard's replicas; a client that knows of no
    shards has one."""

    shards: Sequence[Sequence[str]]
    is_sharded: bool
    token: str | None = None
    tls: ssl.SSLContext | None = None
    timeout: float = 1.0
    connect_timeout: float = 0.25
    max_tries: int = 3
    hedge: Hedge = None
    limits: Limits = field(default_factory=Limits)
    max_skew: int = 0


def options(
    addresses: str | Sequence[str] | None, shards: Sequence[Sequence[str] | str] | None, settings: Settings
) -> Options:
    """Checked options; raises AddressInvalid or RequestInvalid."""
    if (addresses is None) == (shards is None):
        raise AddressInvalid("give either the addresses of servers, or shards, a list of such addresses a shard")
    listed = [addresses] if shards is None else shards
    texts = [[replicas] if isinstance(replicas, str) else list(replicas or ()) for replicas in listed]
    every = [text for replicas in texts for text in replicas]
    if not texts or len(set(every)) < len(every):
        raise AddressInvalid(f"give each address once, and one at least; there are {', '.join(every) or 'none'}")
    checked = Options(texts, shards is not None, **settings)
    if checked.token is not None:
        check_header("token", checked.token)
    for name, least in (("timeout", 0.001), ("connect_timeout", 0.001), ("max_tries", 1), ("max_skew", 0)):
        if not least <= getattr(checked, name) <= LONGEST_SECONDS:
            raise RequestInvalid(f"{name} is {getattr(checked, name)!r}; give {least} or more")
    hedge = checked.hedge
    if not (hedge is None or hedge == "p95" or (isinstance(hedge, int | float) and hedge > 0)):
        raise RequestInvalid(f"hedge is {hedge!r}; give seconds, 'p95' or None")
    return checked


def check_header(name: str, value: str) -> None:
    """Raise RequestInvalid if a header cannot hold a value."""
    if not value.isascii() or not value.isprintable():
        raise RequestInvalid(f"the {name} holds characters that no header may; give printable ASCII")
