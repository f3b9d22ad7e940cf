"""All settings of the server, checked once."""

from ipaddress import ip_address
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from shoal.engine.base.errors import SettingsInvalid
from shoal.engine.base.system import usable_cores


class ServerSettings(BaseModel):
    """The settings of `shoal serve`. Create them with `server_settings`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    store: Path = Field(description="directory of the store")
    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=8080, ge=0, le=65535, description="TCP port to listen on; 0 takes a free one")
    grpc_port: int | None = Field(
        default=None, ge=0, le=65535, description="TCP port for Feast's serving protocol over gRPC; 0 takes a free one"
    )
    unix_socket: Path | None = Field(default=None, description="Unix socket to listen on, instead of host and port")
    workers: int = Field(
        default_factory=usable_cores, ge=1, le=512, description="number of worker processes; default: one per core"
    )
    replace: bool = Field(
        default=False, description="replace the running server of this store, if there is one: see docs/replacing.md"
    )
    drain_seconds: float = Field(
        default=30.0, ge=0, description="how long current requests may take to finish when the server stops"
    )
    ready_lag_seconds: float = Field(
        default=300.0,
        ge=0,
        description="maximum replication lag while /ready answers 200: the age of the root's oldest entry that is not "
        "applied; 0 for no limit: see docs/deploying.md",
    )
    ready_unseen_seconds: float | None = Field(
        default=None,
        gt=0,
        description="how long /ready may still answer 200 while the root cannot be read; no limit by default",
    )
    scrub_hours: float = Field(
        default=24.0,
        ge=0,
        allow_inf_nan=False,
        description="period in hours in which the writer reads the whole store and verifies its checksums; 0 turns "
        "that off: see docs/faults.md",
    )
    silent_seconds: float = Field(
        default=30.0, gt=2, description="how long a process may send no heartbeat before it is replaced"
    )
    max_body_bytes: int = Field(default=32 << 20, gt=0, description="maximum size of a request body in bytes")
    max_keys: int = Field(default=100_000, gt=0, description="maximum number of keys in one request")
    request_timeout_ms: int = Field(
        default=100,
        ge=1,
        description="how long an answer may take while requests queue up, unless the client sets "
        "X-Request-Timeout-Ms; see docs/overload.md",
    )
    max_connections: int = Field(default=1000, ge=1, description="maximum number of connections of one worker")
    patience_seconds: float = Field(
        default=30.0,
        gt=0,
        description="how long a client may take to send its first byte, a request's head, or its body",
    )
    idle_seconds: float = Field(
        default=630.0,
        gt=0,
        description="how long a connection may be idle after an answer; this must be longer than the idle timeout of "
        "load balancers",
    )
    max_values: int = Field(
        default=20_000_000,
        gt=0,
        description="maximum number of values in an answer, keys times features; an embedding counts as its numbers",
    )
    max_answer_bytes: int = Field(
        default=256 << 20, gt=0, description="maximum size of an answer in bytes, both in memory and as sent"
    )
    max_unsent_bytes: int = Field(
        default=512 << 20,
        gt=0,
        description="maximum bytes of answers that one worker keeps for clients that have not read them yet; above it, "
        "lookups are rejected",
    )
    remote_timeout_ms: int = Field(
        default=50,
        ge=1,
        description="how long a request waits for rows from tables, unless the client sets a timeout: see "
        "docs/dynamodb.md",
    )
    remote_hedge_ms: int = Field(
        default=20,
        ge=0,
        description="repeat a request to a table that has no answer after this time, but at most one request in "
        "twenty; 0 for never",
    )
    remote_cache_seconds: float = Field(
        default=2.0, ge=0, description="how long rows from tables may be served from the node's cache; 0 for no cache"
    )
    remote_cache_mib: int = Field(default=256, ge=1, description="maximum size of this cache in MiB")
    feast_strict: bool = Field(
        default=False, description="answer Feast's clients exactly as Feast does, losses included: see docs/feast.md"
    )
    access_log: bool = Field(default=False, description="log every request")
    tokens: Path | None = Field(
        default=None, description="file with the clients' tokens and roles; SHOAL_TOKENS may contain them instead"
    )
    tokens_text: SecretStr | None = Field(default=None, description="the content of such a file, if there is no file")
    protect_metrics: bool = Field(default=False, description="require a token with the role read for /metrics too")
    tls_certificate: Path | None = Field(
        default=None, description="certificate for HTTPS and for gRPC over TLS, with its chain, as PEM"
    )
    tls_key: Path | None = Field(default=None, description="private key of the certificate, as PEM")
    tls_client_ca: Path | None = Field(
        default=None, description="CA certificates, as PEM; clients must have a certificate signed by one of them"
    )
    open_to_all: bool = Field(
        default=False, description="accept any client that can reach the address, without token or certificate"
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
    """Return checked settings, with defaults for the missing ones.

    Raises:
        SettingsInvalid: a setting is invalid; the message names the first one, and its value.
    """
    try:
        settings = ServerSettings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = ", ".join(ServerSettings.model_fields)
            raise SettingsInvalid(f"there is no setting {name!r}; the settings are: {known}") from None
        if first["type"] == "missing":
            raise SettingsInvalid(f"the setting {name!r} is missing; give one") from None
        raise SettingsInvalid(f"{name} is {first['input']!r}: {first['msg']}") from None
    _check_together(settings)
    return settings


def _check_together(settings: ServerSettings) -> None:
    if (settings.tls_certificate is None) != (settings.tls_key is None):
        there, lacking = ("tls_key", "tls_certificate") if settings.tls_key else ("tls_certificate", "tls_key")
        raise SettingsInvalid(f"{there} is set, but {lacking} is not; TLS needs both: set both")
    if settings.tls_client_ca is not None and settings.tls_certificate is None:
        raise SettingsInvalid("tls_client_ca is set, but tls_certificate is not; client certificates need TLS")
    # A warning in the log is not enough: others could read or write the features before anybody reads the log.
    lets_all_in = not settings.asks_for_tokens and settings.tls_client_ca is None
    if settings.reaches_beyond and lets_all_in and not settings.open_to_all:
        raise SettingsInvalid(
            f"host is {settings.host!r}, which other machines can reach, and any of them could read, write and reload; "
            f"set tokens, or tls_client_ca, or open_to_all if the network admits only trusted clients"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
