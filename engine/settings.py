"""All settings of the server, checked once."""

import os
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from engine.errors import SettingsInvalid


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0))


class ServerSettings(BaseModel):
    """What `shoal serve` can be told. Make one with `server_settings`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    store: Path = Field(description="directory of the store")
    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=8080, ge=0, le=65535, description="TCP port to listen on; 0 takes a free one")
    grpc_port: int | None = Field(
        default=None, ge=0, le=65535, description="TCP port for Feast's serving protocol over gRPC; 0 takes a free one"
    )
    unix_socket: Path | None = Field(default=None, description="Unix socket to listen on, instead of host and port")
    workers: int = Field(
        default_factory=_usable_cores, ge=1, le=512, description="worker processes; as many as there are cores"
    )
    replace: bool = Field(
        default=False, description="take the place of the server of this store, if one runs: see docs/replacing.md"
    )
    drain_seconds: float = Field(
        default=30.0, ge=0, description="how long requests under way may take to finish when the server stops"
    )
    ready_lag_seconds: float = Field(
        default=300.0,
        ge=0,
        description="how long the oldest entry of the root that is not applied may have been published while /ready "
        "answers 200; 0 has it answer so whatever the root has: see docs/deploying.md",
    )
    ready_unseen_seconds: float | None = Field(
        default=None,
        gt=0,
        description="how long /ready may go on answering 200 while the root cannot be read; for ever, if not given",
    )
    scrub_hours: float = Field(
        default=24.0,
        ge=0,
        allow_inf_nan=False,
        description="within how many hours the writer reads all of the store again and verifies its checksums; 0 turns "
        "that off: see docs/faults.md",
    )
    silent_seconds: float = Field(
        default=30.0, gt=2, description="how long a process may give no sign of life until it is replaced"
    )
    max_body_bytes: int = Field(default=32 << 20, gt=0, description="the largest request body that is taken")
    max_keys: int = Field(default=100_000, gt=0, description="the most keys that one request may ask for")
    request_timeout_ms: int = Field(
        default=100,
        ge=1,
        description="how long an answer may take while requests queue up, unless its client sets "
        "X-Request-Timeout-Ms; see docs/overload.md",
    )
    max_connections: int = Field(default=1000, ge=1, description="the most connections that one worker keeps")
    patience_seconds: float = Field(
        default=30.0,
        gt=0,
        description="how long a client may take to send its first byte, a request's head, or its body",
    )
    idle_seconds: float = Field(
        default=630.0,
        gt=0,
        description="how long a connection may be idle after an answer; this must be longer than load balancers keep "
        "theirs",
    )
    max_values: int = Field(
        default=20_000_000,
        gt=0,
        description="the most values, keys times features, that an answer may hold; an embedding counts as its numbers",
    )
    max_answer_bytes: int = Field(
        default=256 << 20, gt=0, description="the most bytes that an answer may take, both in memory and as sent"
    )
    max_unsent_bytes: int = Field(
        default=512 << 20,
        gt=0,
        description="how many bytes of answers one worker holds for clients that have not read them yet; beyond that "
        "it refuses lookups",
    )
    remote_timeout_ms: int = Field(
        default=50,
        ge=1,
        description="how long rows that are kept in tables are waited for, where the client does not say how long it "
        "waits: see docs/dynamodb.md",
    )
    remote_hedge_ms: int = Field(
        default=20,
        ge=0,
        description="send what a table has not answered after so long once more, of twenty requests one at most; 0 for "
        "never",
    )
    remote_cache_seconds: float = Field(
        default=2.0, ge=0, description="how long rows of tables may be served from the node's cache; 0 for no cache"
    )
    remote_cache_mib: int = Field(default=256, ge=1, description="the most room that the cache of such rows takes")
    feast_strict: bool = Field(
        default=False, description="answer Feast's clients to the letter, losses included: see docs/feast.md"
    )
    access_log: bool = Field(default=False, description="log every request")
    tokens: Path | None = Field(
        default=None, description="file with the tokens of clients and their roles; SHOAL_TOKENS may hold it instead"
    )
    tokens_text: SecretStr | None = Field(default=None, description="what such a file would say, if there is none")
    protect_metrics: bool = Field(default=False, description="ask for a token that may read on /metrics too")
    tls_certificate: Path | None = Field(
        default=None, description="certificate to serve HTTPS, and gRPC over TLS, with its chain, as PEM"
    )
    tls_key: Path | None = Field(default=None, description="private key of the certificate, as PEM")
    tls_client_ca: Path | None = Field(
        default=None, description="ask clients for a certificate, signed by one of these, as PEM"
    )
    open_to_all: bool = Field(
        default=False, description="let whoever reaches the address in without token or certificate"
    )

    @property
    def asks_for_tokens(self) -> bool:
        """Whether requests need a token."""
        return self.tokens is not None or self.tokens_text is not None

    @property
    def reaches_beyond(self) -> bool:
        """Whether other machines can reach the server."""
        listens = self.unix_socket is None or self.grpc_port is not None
        return listens and not _is_loopback(self.host)


def server_settings(**values: Any) -> ServerSettings:
    """Checked settings; those not given have their defaults.

    Raises:
        SettingsInvalid: naming the first setting that is wrong, and its value.
    """
    try:
        settings = ServerSettings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = ", ".join(ServerSettings.model_fields)
            raise SettingsInvalid(f"there is no setting {name!r}; there are {known}") from None
        if first["type"] == "missing":
            raise SettingsInvalid(f"the setting {name!r} is missing; give one") from None
        raise SettingsInvalid(f"{name} is {first['input']!r}: {first['msg']}") from None
    _check_together(settings)
    return settings


def _check_together(settings: ServerSettings) -> None:
    if (settings.tls_certificate is None) != (settings.tls_key is None):
        there, lacking = ("tls_key", "tls_certificate") if settings.tls_key else ("tls_certificate", "tls_key")
        raise SettingsInvalid(f"{there} is set, and {lacking} is not; one is of no use without the other: give both")
    if settings.tls_client_ca is not None and settings.tls_certificate is None:
        raise SettingsInvalid("tls_client_ca is set, and tls_certificate is not; clients show theirs over TLS only")
    # A warning would stand in a log that nobody reads until the features have been read, or written, by somebody else.
    lets_all_in = not settings.asks_for_tokens and settings.tls_client_ca is None
    if settings.reaches_beyond and lets_all_in and not settings.open_to_all:
        raise SettingsInvalid(
            f"host is {settings.host!r}, which other machines can reach, and any of them could read, write and reload; "
            f"set tokens, or tls_client_ca, or open_to_all if the network lets in only who may"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
