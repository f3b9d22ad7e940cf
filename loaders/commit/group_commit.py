"""Commit the heartbeats of many views together, because each commit makes every worker read the catalog again.

A heartbeat is an entry without rows. An export publishes it to say that nothing changed. An export of many views
publishes one heartbeat per view, all within moments.
"""

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

from shoal.engine.format.catalog import ViewRecord

Change = Callable[[ViewRecord], ViewRecord | None]
"""A function that makes a view's next record from the newest one; it returns None if the change no longer applies."""
Commit = Callable[[Mapping[str, Change]], dict[str, ViewRecord]]
"""A function that commits changes by view in one transaction, and returns the new records."""


@dataclass(frozen=True)
class _Waiting:
    view: str
    change: Change
    done: Future[ViewRecord | None] = field(default_factory=Future)


class GroupCommit:
    """Collects changes from several threads, and commits them together. A view may have only one change at a time.

    Args:
        gather_seconds: how long the first change waits for other changes.
    """

    def __init__(self, gather_seconds: float) -> None:
        self._gather_seconds = gather_seconds
        self._lock = threading.Lock()
        self._waiting: list[_Waiting] = []

    def submit(self, view: str, change: Change, commit: Commit) -> ViewRecord | None:
        """Commit a change of a view's record, and return the new record. Return None if the change no longer applied.

        When this returns, the change is on the disk and visible. Raise any error that `commit` raises.
        """
        own = _Waiting(view, change)
        with self._lock:
            self._waiting.append(own)
            leads = len(self._waiting) == 1
        if leads:
            time.sleep(self._gather_seconds)
            with self._lock:
                group = self._waiting
                self._waiting = []
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
