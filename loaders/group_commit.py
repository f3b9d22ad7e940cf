"""Commit the heartbeats of many views at once: each commit makes every worker read the catalog again.

A heartbeat is an entry without rows, by which an export says that nothing changed. An export of many views publishes
one for each of them, within moments.
"""

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

from engine.catalog import ViewRecord

Change = Callable[[ViewRecord], ViewRecord | None]
"""Makes a view's next record of the newest one; None if it no longer applies."""
Commit = Callable[[Mapping[str, Change]], dict[str, ViewRecord]]
"""Commits changes by view in one transaction, and returns the new records."""


@dataclass(frozen=True)
class _Waiting:
    view: str
    change: Change
    done: Future[ViewRecord | None] = field(default_factory=Future)


class GroupCommit:
    """Gathers changes from several threads, at most one for each view at a time, and commits them together.

    Args:
        gather_seconds: how long the first change waits for others.
    """

    def __init__(self, gather_seconds: float) -> None:
        self._gather_seconds = gather_seconds
        self._lock = threading.Lock()
        self._waiting: list[_Waiting] = []

    def submit(self, view: str, change: Change, commit: Commit) -> ViewRecord | None:
        """Change a view's record by `commit`; when this returns the change is on disk and visible. Returns None if it
        no longer applied. Raises what `commit` raises.
        """
        own = _Waiting(view, change)
        with self._lock:
            self._waiting.append(own)
            leads = len(self._waiting) == 1
        if leads:
            time.sleep(self._gather_seconds)
            with self._lock:
                group, self._waiting = self._waiting, []
            _commit_group(group, commit)
        return own.done.result()


def _commit_group(group: list[_Waiting], commit: Commit) -> None:
    try:
        records = commit({waiting.view: waiting.change for waiting in group})
    except BaseException as error:
        for waiting in group:
            waiting.done.set_exception(error)
        return
    for waiting in group:
        waiting.done.set_result(records.get(waiting.view))
