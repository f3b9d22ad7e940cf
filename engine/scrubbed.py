"""How far the writer's scrub of a store has come: for the next writer, for metrics and for `shoal status`.

    <store>/run/scrubbed.json    replaced by the writer as it goes on

A writer that stops in order says so in this file. A file that is missing, or that does not say so, means that the store
was not closed in order: then all of the store is to be read again at once.
"""

import os
import time
from pathlib import Path
from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt, PositiveFloat, ValidationError

from engine.directory_storage import sync_directory
from engine.run_directory import run_path


class Scrubbed(BaseModel):
    """The progress of a scrub. Times are in seconds since 1970.

    `chunks` has, for each segment, when the verification of each of its chunks began that found it whole or damaged; a
    new chunk counts as verified when it was made. Chunks that were verified before `suspect_since` are in doubt since
    an unclean shutdown.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    period_seconds: PositiveFloat
    clean: bool = False
    suspect_since: NonNegativeFloat = 0.0
    bytes_verified: NonNegativeInt = 0
    damaged_chunks: NonNegativeInt = 0
    chunks: dict[str, tuple[NonNegativeFloat, ...]] = {}

    @property
    def oldest(self) -> float | None:
        """When the chunk was verified that was not verified for longest; None without any chunk."""
        return min((time for times in self.chunks.values() for time in times), default=None)

    @property
    def suspect_chunks(self) -> int:
        """How many chunks were not verified yet since an unclean shutdown."""
        return sum(time < self.suspect_since for times in self.chunks.values() for time in times)


def scrubbed_path(store: Path) -> Path:
    """Where the progress is kept."""
    return run_path(store) / "scrubbed.json"


def read_scrubbed(store: Path) -> Scrubbed | None:
    """The progress that a writer left; None if there is none, or it cannot be read."""
    try:
        return Scrubbed.model_validate_json(scrubbed_path(store).read_bytes())
    except (OSError, ValidationError):
        return None


def write_scrubbed(store: Path, scrubbed: Scrubbed, *, durable: bool) -> None:
    """Replace the progress, atomically.

    Args:
        durable: have it on the disk when this returns. Whether a store was closed in order must be, as a power failure
            would bring the older answer back.

    Raises:
        OSError: it cannot be written; the earlier progress stands.
    """
    path = scrubbed_path(store)
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(orjson.dumps(scrubbed.model_dump(mode="json")))
        if durable:
            file.flush()
            os.fsync(file.fileno())
    temporary.replace(path)
    if durable:
        sync_directory(path.parent)


def forget_scrubbed(store: Path) -> None:
    """A writer without a scrub begins: nobody will know whether it stopped in order."""
    scrubbed_path(store).unlink(missing_ok=True)


def describe_scrub(store: Path) -> dict[str, Any] | None:
    """The progress as a plain document; None if no writer scrubs the store."""
    scrubbed = read_scrubbed(store)
    if scrubbed is None:
        return None
    oldest = scrubbed.oldest
    return {
        "period_seconds": scrubbed.period_seconds,
        "age_seconds": max(0.0, time.time() - oldest) if oldest is not None else None,
        "bytes_verified": scrubbed.bytes_verified,
        "damaged_chunks": scrubbed.damaged_chunks,
        "suspect_chunks": scrubbed.suspect_chunks,
    }
