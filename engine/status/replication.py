"""The replication status of a store: how far it is behind its export root. Readiness and metrics use this status.

    <store>/run/standing.json    replaced by the writer when the status changes, touched each time the root is read

The status is a separate file, not a record in the store. If it were a record, each read of the root would commit a new
version of the store for nothing.
"""

import os
import time
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import orjson
from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from shoal.engine.process.run_directory import run_path

_CONTINUED_SECONDS = 300.0


class FollowState(BaseModel):
    """The replication status of one view.

    `newest_seq` is the seq of the newest log entry in the root, or 0 if no entry was seen. `pending_since` is the time
    at which the oldest entry that is not applied was published.

    `caught_up` stays true once the view has reached the end of its log. `held_by` is the error of an entry that no
    replica can apply; readiness does not wait for such an entry. `is_loading` is true while a snapshot loads; readiness
    tolerates lag during this time. `excused_until` is the time at which the last load of a snapshot ended; lag from
    before that time is tolerated too. `unreadable_since` is the time at which reading an entry from the root began to
    fail; while this is set, lag is measured up to that time.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    newest_seq: int = 0
    pending_since: AwareDatetime | None = None
    caught_up: bool = False
    held_by: str | None = None
    is_loading: bool = False
    excused_until: AwareDatetime | None = None
    unreadable_since: AwareDatetime | None = None


class ReplicationStatus(BaseModel):
    """The export root, the time at which it was last read, and its views by name. While the root cannot be read,
    `unreadable` is the reason, and `unreadable_since` is the time of the first failure."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    root: str
    seen_at: AwareDatetime | None = None
    unreadable: str | None = None
    unreadable_since: AwareDatetime | None = None
    views: dict[str, FollowState] = {}


class Lag(NamedTuple):
    """The replication lag of a view: the number of entries that are not applied, and the time in seconds since the
    oldest of these entries was published."""

    entries: int
    seconds: float


def lag_of(view: FollowState, applied_seq: int, now: datetime) -> Lag:
    """Return the lag of a view that has applied its log up to `applied_seq` (0 if the view has no data yet)."""
    entries = max(0, view.newest_seq - applied_seq)
    since = view.pending_since if entries else None
    return Lag(entries, max(0.0, (now - since).total_seconds()) if since is not None else 0.0)


def replication_path(store: Path) -> Path:
    """Return the path of the status file."""
    return run_path(store) / "standing.json"


def read_replication(store: Path) -> ReplicationStatus | None:
    """Return the status that a writer left; None if there is no status, or it cannot be read."""
    try:
        return ReplicationStatus.model_validate_json(replication_path(store).read_bytes())
    except (OSError, ValidationError):
        return None


def write_replication(store: Path, standing: ReplicationStatus) -> None:
    """Replace the status atomically, without fsync: it need not survive a crash of the machine."""
    path = replication_path(store)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(orjson.dumps(standing.model_dump(mode="json")))
    temporary.replace(path)


def touch_replication(store: Path) -> None:
    """Touch the status file. Its modification time says when the writer last read the root, or tried to."""
    os.utime(replication_path(store))


def forget_old_replication(store: Path) -> None:
    """Remove the status that an earlier server left, unless that server followed the root until a few minutes ago.

    Call this when a server starts.
    """
    path = replication_path(store)
    try:
        age = time.time() - path.stat().st_mtime
    except OSError:
        return
    if not 0 <= age <= _CONTINUED_SECONDS:
        path.unlink(missing_ok=True)


class ReplicationReader:
    """A cached reader of the replication status: it reads the file again only when the file has changed."""

    def __init__(self, store: Path) -> None:
        self._store = store
        self._known: tuple[int, int] | None = None
        self._standing: ReplicationStatus | None = None

    def read(self) -> ReplicationStatus | None:
        """Return the status as `read_replication` does. If the file was removed, return the status that was read
        last."""
        try:
            status = replication_path(self._store).stat()
        except OSError:
            return self._standing
        # Each replacement of the file has another inode or a later modification time.
        found = (status.st_ino, status.st_mtime_ns)
        if found != self._known:
            self._standing = read_replication(self._store)
            self._known = found
        return self._standing
