"""What a client may be told, and what it takes where it is told nothing; checked once."""

import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TypedDict

from shoal_client.addresses import read_addresses
from shoal_client.arguments import check_amount, check_count, check_header, check_seconds
from shoal_client.calls import Hedge
from shoal_client.errors import RequestInvalid
from shoal_client.replicas import Limits
from shoal_client.showing import shown


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
    texts = read_addresses(addresses, shards)
    if unknown := settings.keys() - Settings.__annotations__.keys():
        known = ", ".join(Settings.__annotations__)
        raise RequestInvalid(f"there is no setting {min(unknown)!r}; the settings are: {known}")
    checked = Options(texts, shards is not None, **settings)
    if checked.token is not None:
        check_header("token", checked.token)
    if not (checked.tls is None or isinstance(checked.tls, ssl.SSLContext)):
        raise RequestInvalid(f"tls is {shown(checked.tls)}; give an ssl.SSLContext, or None for the system's")
    check_seconds("timeout", checked.timeout, 0.001)
    check_seconds("connect_timeout", checked.connect_timeout, 0.001)
    check_count("max_tries", checked.max_tries, 1)
    check_count("max_skew", checked.max_skew, 0)
    if not (checked.hedge is None or checked.hedge == "p95"):
        check_seconds("hedge (neither None nor 'p95')", checked.hedge)
    if not isinstance(checked.limits, Limits):
        raise RequestInvalid(f"limits is {shown(checked.limits)}; give shoal_client.Limits(…)")
    for limit in fields(Limits):
        check_amount(f"limits.{limit.name}", getattr(checked.limits, limit.name))
    return checked
