"""Whether a server is ready for requests: its replication lag behind the export root is small.

A replica that has fallen behind is taken out of rotation, but a shared cause must never take out all replicas at once.
So the check is strict until a replica has caught up for the first time. After that, only its own slowness counts:

- a root that cannot be read leaves readiness unchanged for `ready_unseen_seconds`: a view is judged as of the moment
  when it could no longer follow;
- an entry that no replica can apply is not waited for;
- nor is a snapshot while it loads, nor the deltas that were published meanwhile, until they have had their time.
"""

from datetime import UTC, datetime

from engine.errors import NotCaughtUp
from engine.settings import ServerSettings
from engine.standing import Standing, StandingReader, ViewStanding, lag_of
from engine.version import StoreVersion

_NAMED = 5


class Readiness:
    """Judges by what the writer left. A server that follows no root, or has no `ready_lag_seconds`, is not judged."""

    def __init__(self, settings: ServerSettings, *, follows: bool) -> None:
        self._most = settings.ready_lag_seconds
        self._most_unseen = settings.ready_unseen_seconds
        self._reader = StandingReader(settings.store)
        self._follows = follows
        self._judges = follows and self._most > 0

    def check(self, version: StoreVersion) -> None:
        """Raises NotCaughtUp, which names the views that are behind, and how far."""
        if not self._judges:
            return
        standing, now = self._reader.read(), datetime.now(UTC)
        if standing is None or standing.seen_at is None:
            told = f": {standing.unreadable}" if standing is not None and standing.unreadable else ""
            raise NotCaughtUp(f"the export root was not read yet, so it is unknown how far behind the store is{told}")
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
        """Return why nothing is loaded yet; None if no root is followed, or it was not read yet."""
        standing = self._reader.read() if self._follows else None
        if standing is None:
            return None
        return standing.unreadable or f"the first snapshot of {standing.root} is still being loaded"

    def _behind(self, standing: Standing, version: StoreVersion, now: datetime) -> list[str]:
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
                found.append(f"{name}: nothing of it is loaded yet, {_entries(lag.entries)} behind")
            elif lag.entries and (not view.caught_up or min(lag.seconds, _granted(view, as_of)) > self._most):
                found.append(f"{name}: {_entries(lag.entries)} behind, the oldest published {lag.seconds:.0f} s ago")
        return found


def _granted(view: ViewStanding, now: datetime) -> float:
    """The seconds that a view has had, since it loaded its last snapshot, to apply what was published meanwhile."""
    return (now - view.excused_until).total_seconds() if view.excused_until is not None else float("inf")


def _entries(count: int) -> str:
    return f"{count} {'entry' if count == 1 else 'entries'}"
