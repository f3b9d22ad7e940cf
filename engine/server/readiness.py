"""The readiness check: a server is ready for requests if its replication lag behind the export root is small.

A replica that has fallen behind is taken out of rotation, but a shared cause must never take out all replicas at once.
So the check is strict until a replica has caught up for the first time. After that, only the replica's own slowness
counts:

- While the root cannot be read, readiness stays unchanged for `ready_unseen_seconds`: the lag of a view is computed for
  the time when the view could no longer follow the root.
- The lag does not count if no replica can apply the view's next entry.
- The lag does not count while a snapshot loads. The deltas that were published meanwhile get a grace period.
"""

from datetime import UTC, datetime

from shoal.engine.base.errors import NotCaughtUp
from shoal.engine.server.settings import ServerSettings
from shoal.engine.status.replication import FollowState, ReplicationReader, ReplicationStatus, lag_of
from shoal.engine.store.version import StoreVersion

_NAMED = 5


class Readiness:
    """The check of the replication status that the writer records. Without a root, or if `ready_lag_seconds` is 0, the
    check always passes."""

    def __init__(self, settings: ServerSettings, *, follows: bool) -> None:
        self._most = settings.ready_lag_seconds
        self._most_unseen = settings.ready_unseen_seconds
        self._reader = ReplicationReader(settings.store)
        self._follows = follows
        self._judges = follows and self._most > 0

    def check(self, version: StoreVersion) -> None:
        """Raise NotCaughtUp if views are behind; the error names these views and their lag."""
        if not self._judges:
            return
        standing = self._reader.read()
        now = datetime.now(UTC)
        if standing is None or standing.seen_at is None:
            cause = f": {standing.unreadable}" if standing is not None and standing.unreadable else ""
            raise NotCaughtUp(f"the export root was not read yet, so the replication lag is unknown{cause}")
        unread_since = [view.unreadable_since for view in standing.views.values() if view.unreadable_since is not None]
        unseen = (now - min([standing.seen_at, *unread_since])).total_seconds()
        if self._most_unseen is not None and unseen > self._most_unseen:
            raise NotCaughtUp(
                f"the export root {standing.root} was last read {unseen:.0f} s ago, and ready_unseen_seconds is "
                f"{self._most_unseen:g}" + (f": {standing.unreadable}" if standing.unreadable else "")
            )
        behind = self._behind(standing, version, now)
        if behind:
            more = f"; and {len(behind) - _NAMED} more views" if len(behind) > _NAMED else ""
            raise NotCaughtUp(f"{'; '.join(behind[:_NAMED])}{more}; ready_lag_seconds is {self._most:g}")

    def why_empty(self) -> str | None:
        """Return why nothing is loaded yet; None if the server follows no root, or its writer recorded no status."""
        standing = self._reader.read() if self._follows else None
        if standing is None:
            return None
        return standing.unreadable or f"the first snapshot of {standing.root} is still being loaded"

    def _behind(self, standing: ReplicationStatus, version: StoreVersion, now: datetime) -> list[str]:
        found = []
        for name, view in sorted(standing.views.items()):
            record = version.record(name)
            if view.held_by is not None or (record is not None and record.pinned):
                continue
            if view.newest_seq == 0:
                found.append(f"{name}: not compared with the root yet")
                continue
            if view.caught_up and view.is_loading:
                continue
            as_of = min([now, *filter(None, (standing.unreadable_since, view.unreadable_since))])
            lag = lag_of(view, version.applied_seq(name), as_of)
            if record is None:
                found.append(f"{name}: not loaded yet, {_entries(lag.entries)} behind")
            elif lag.entries and (not view.caught_up or min(lag.seconds, _granted(view, as_of)) > self._most):
                found.append(f"{name}: {_entries(lag.entries)} behind, the oldest published {lag.seconds:.0f} s ago")
        return found


def _granted(view: FollowState, now: datetime) -> float:
    """Return how many seconds a view has had to catch up since its last load of a snapshot ended; infinity if there was
    no such load."""
    return (now - view.excused_until).total_seconds() if view.excused_until is not None else float("inf")


def _entries(count: int) -> str:
    return f"{count} {'entry' if count == 1 else 'entries'}"
