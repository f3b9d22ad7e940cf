"""All settings of the server, checked once."""

import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engine.errors import SettingsInvalid


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0))


class ServerSettings(BaseModel):
    """What `shoal serve` can be told. Make one with `server_settings`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    store: Path = Field(description="directory of the store")
    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=8080, ge=0, le=65535, description="TCP port to listen on; 0 takes a free one")
    unix_socket: Path | None = Field(default=None, description="Unix socket to listen on, instead of host and port")
    workers: int = Field(
        default_factory=_usable_cores, ge=1, le=512, description="worker processes; as many as there are cores"
    )
    drain_seconds: float = Field(
        default=30.0, ge=0, description="how long requests under way may take to finish when the server stops"
    )
    silent_seconds: float = Field(
        default=30.0, gt=2, description="how long a worker may give no sign of life until it is replaced"
    )
    max_body_bytes: int = Field(default=32 << 20, gt=0, description="the largest request body that is taken")
    max_keys: int = Field(default=100_000, gt=0, description="the most keys that one request may ask for")
    feast_strict: bool = Field(
        default=False, description="answer Feast's clients to the letter, losses included: see docs/feast.md"
    )
    access_log: bool = Field(default=False, description="log every request")


def server_settings(**values: Any) -> ServerSettings:
    """Checked settings; those not given have their defaults.

    Raises:
        SettingsInvalid: naming the first setting that is wrong, and its value.
    """
    try:
        return ServerSettings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = ", ".join(ServerSettings.model_fields)
            raise SettingsInvalid(f"there is no setting {name!r}; there are {known}") from None
        if first["type"] == "missing":
            raise SettingsInvalid(f"the setting {name!r} is missing; give one") from None
        raise SettingsInvalid(f"{name} is {first['input']!r}: {first['msg']}") from None
