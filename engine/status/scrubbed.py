"""The progress of the writer's scrub of a store: for the next writer, for metrics and for `shoal status`.

    <store>/run/scrubbed.json    replaced by the writer as the scrub proceeds

A writer that stops cleanly records its clean stop in this file. If the file is missing or lacks this note, the store
was not closed cleanly. The scrub must then read the whole store again at once.
"""

import os
import time
from pathlib import Path
from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt, PositiveFloat, ValidationError

from shoal.engine.process.run_directory import run_path
from shoal.engine.root.directory_storage import sync_directory


class Scrubbed(BaseModel):
    """The progress of a scrub. Times are in seconds since 1970.

    `chunks` has, for each segment, one time per chunk: the start of the last verification that ended with a result
    (intact or damaged). A new chunk counts as verified at its creation. A chunk that was last verified before
    `suspect_since` is in doubt because of an unclean shutdown.
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
        """The time of the oldest verification among all chunks; None if there are no chunks."""
        return min((time for times in self.chunks.values() for time in times), default=None)

    @property
    def suspect_chunks(self) -> int:
        """The number of chunks that have not been verified since an unclean shutdown."""
        return sum(time < self.suspect_since for times in self.chunks.values() for time in times)


def scrubbed_path(store: Path) -> Path:
    """Return the path of the progress file."""
    return run_path(store) / "scrubbed.json"


def read_scrubbed(store: Path) -> Scrubbed | None:
    """Return the progress that a writer left; None if there is no progress file, or it cannot be read."""
    try:
        return Scrubbed.model_validate_json(scrubbed_path(store).read_bytes())
    except (OSError, ValidationError):
        return None


def write_scrubbed(store: Path, scrubbed: Scrubbed, *, durable: bool) -> None:
    """Replace the progress atomically.

    Args:
        durable: whether the file must be on the disk when this returns. The note whether the store was closed cleanly
            must be durable. Otherwise a power failure could bring back the earlier note.

    Raises:
        OSError: the file cannot be written; the earlier progress stays.
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
    """Remove the progress file. Call this when a writer without a scrub starts: it does not record whether it stops
    cleanly."""
    scrubbed_path(store).unlink(missing_ok=True)


def describe_scrub(store: Path) -> dict[str, Any] | None:
    """Return the progress as a plain document; None if no writer scrubs the store."""
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
