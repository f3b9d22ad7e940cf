"""Where a store stands against the export root that it follows, as its writer saw it last: for readiness and metrics.

    <store>/run/standing.json    replaced by the writer whenever it learns something, touched at every look

It is a file beside the data, not a record in it: a commit at each look would be a new version of the store for nothing.
"""

import os
import time
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import orjson
from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from engine.run_directory import run_path

_CONTINUED_SECONDS = 300.0


class ViewStanding(BaseModel):
    """A view of the root. `newest_seq` is the newest entry seen, 0 if none was seen. `pending_since` is when the oldest
    entry that is not applied was published.

    `caught_up` stays true once the view has reached the end of its log. `held_by` is the error of an entry that no
    replica can apply; readiness does not wait for it. Lag is excused while a snapshot `is_loading`, and up to
    `excused_until`, when the last one was loaded. Lag is not judged from `unreadable_since` on, when the root began to
    fail while an entry was read.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    newest_seq: int = 0
    pending_since: AwareDatetime | None = None
    caught_up: bool = False
    held_by: str | None = None
    is_loading: bool = False
    excused_until: AwareDatetime | None = None
    unreadable_since: AwareDatetime | None = None


class Standing(BaseModel):
    """A root, the time when it was last read, and its views by name. While it cannot be read, `unreadable` says why,
    and `unreadable_since` since when."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    root: str
    seen_at: AwareDatetime | None = None
    unreadable: str | None = None
    unreadable_since: AwareDatetime | None = None
    views: dict[str, ViewStanding] = {}


class Lag(NamedTuple):
    """How many entries a view is behind its root, and for how many seconds the oldest of them has been published."""

    entries: int
    seconds: float


def lag_of(view: ViewStanding, applied_seq: int, now: datetime) -> Lag:
    """How far behind a view is that has applied the log up to a seq; 0 of a view of which nothing is loaded."""
    entries = max(0, view.newest_seq - applied_seq)
    since = view.pending_since if entries else None
    return Lag(entries, max(0.0, (now - since).total_seconds()) if since is not None else 0.0)


def standing_path(store: Path) -> Path:
    """Where it is left."""
    return run_path(store) / "standing.json"


def read_standing(store: Path) -> Standing | None:
    """What a writer left; None if none has, or it cannot be read."""
    try:
        return Standing.model_validate_json(standing_path(store).read_bytes())
    except (OSError, ValidationError):
        return None


def write_standing(store: Path, standing: Standing) -> None:
    """Replace it, atomically; it need not outlive the machine."""
    path = standing_path(store)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(orjson.dumps(standing.model_dump(mode="json")))
    temporary.replace(path)


def touch_standing(store: Path) -> None:
    """The writer looked, or tried to."""
    os.utime(standing_path(store))


def forget_old_standing(store: Path) -> None:
    """A server starts: what the one before it knew counts only if that followed the root until just now."""
    path = standing_path(store)
    try:
        age = time.time() - path.stat().st_mtime
    except OSError:
        return
    if not 0 <= age <= _CONTINUED_SECONDS:
        path.unlink(missing_ok=True)


class StandingReader:
    """What the writer left, read again when it is another file."""

    def __init__(self, store: Path) -> None:
        self._store = store
        self._known: tuple[int, int] | None = None
        self._standing: Standing | None = None

    def read(self) -> Standing | None:
        """As `read_standing`, but if the file was removed, return its last content."""
        try:
            status = standing_path(self._store).stat()
        except OSError:
            return self._standing
        # A touch alone changes no content, and every replacement is another inode or a later time.
        found = (status.st_ino, status.st_mtime_ns)
        if found != self._known:
            self._standing, self._known = read_standing(self._store), found
        return self._standing
