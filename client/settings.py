"""The settings of a client and their default values, checked once."""

import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TypedDict

from shoal.client.addresses import read_addresses
from shoal.client.arguments import check_amount, check_count, check_header, check_seconds
from shoal.client.calls import Hedge
from shoal.client.errors import RequestInvalid
from shoal.client.quoting import abbreviated
from shoal.client.replicas import Limits


class Settings(TypedDict, total=False):
    """The settings of a client besides addresses. Times are in seconds.

    - `token` is sent with each request.
    - `tls` has the trusted certificates, and the client's own certificate. The default is the system's trust store.
    - `timeout` is the time limit for an operation. The default is 1.0.
    - `connect_timeout` is the time limit for making a connection. The default is 0.25.
    - `max_tries` is the maximum number of times that a request is sent, hedges included. The default is 3.
    - `hedge` is the delay after which a lookup is also sent to a second replica: a number of seconds, "p95" for the
      95th percentile of response times, or None for no hedges. The default is None.
    - `limits` are the limits on retries and hedges.
    - `max_skew` is the number of log entries by which the shards in an answer may differ. The default is 0.
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
    """The settings with their defaults. `shards` are the addresses of each shard's replicas; there is one entry if the
    client is not sharded."""

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
    """Check addresses and settings, and return the options; raise AddressInvalid or RequestInvalid for invalid ones."""
    texts = read_addresses(addresses, shards)
    if unknown := settings.keys() - Settings.__annotations__.keys():
        known = ", ".join(Settings.__annotations__)
        raise RequestInvalid(f"there is no setting {min(unknown)!r}; the settings are: {known}")
    checked = Options(texts, shards is not None, **settings)
    if checked.token is not None:
        check_header("token", checked.token)
    if not (checked.tls is None or isinstance(checked.tls, ssl.SSLContext)):
        raise RequestInvalid(f"tls is {abbreviated(checked.tls)}; give an ssl.SSLContext, or None for the system's")
    check_seconds("timeout", checked.timeout, 0.001)
    check_seconds("connect_timeout", checked.connect_timeout, 0.001)
    check_count("max_tries", checked.max_tries, 1)
    check_count("max_skew", checked.max_skew, 0)
    if not (checked.hedge is None or checked.hedge == "p95"):
        check_seconds("hedge (neither None nor 'p95')", checked.hedge)
    if not isinstance(checked.limits, Limits):
        raise RequestInvalid(f"limits is {abbreviated(checked.limits)}; give shoal.client.Limits(…)")
    for limit in fields(Limits):
        check_amount(f"limits.{limit.name}", getattr(checked.limits, limit.name))
    return checked
