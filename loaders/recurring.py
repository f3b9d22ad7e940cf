"""Tell the log of what fails again and again, at every poll: once, when it changes, and then ever more seldom."""

import logging
import threading
from dataclasses import dataclass, field
from time import monotonic

_FIRST_SECONDS, _MOST_SECONDS = 60.0, 3600.0
_MESSAGES = 16
"""How many different messages are told of one subject before it is told by the clock alone."""


@dataclass
class _Failing:
    since: float
    again_at: float
    interval: float = _FIRST_SECONDS
    messages: set[str] = field(default_factory=set)


class RecurringFailures:
    """What fails now, by subject: a view, or the export root. Its methods may be called from several threads."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._lock = threading.Lock()
        self._failing: dict[str, _Failing] = {}

    def failed(self, subject: str, message: str, level: int = logging.ERROR) -> None:
        """Tell a failure, which its message names, unless the same was told lately."""
        now = monotonic()
        with self._lock:
            known = self._failing.setdefault(subject, _Failing(since=now, again_at=now))
            is_new = message not in known.messages and len(known.messages) < _MESSAGES
            is_due = now >= known.again_at
            if not is_new and not is_due:
                return
            known.messages.add(message)
            if is_due:
                known.again_at = now + known.interval
                known.interval = min(2 * known.interval, _MOST_SECONDS)
        lasts = f" (for {now - known.since:.0f} s now)" if not is_new else ""
        self._log.log(level, "%s%s", message, lasts)

    def succeeded(self, subject: str) -> None:
        """Tell that a failure is over, if there was one."""
        with self._lock:
            known = self._failing.pop(subject, None)
        if known is not None:
            self._log.info("%s: recovered after %.0f s", subject, monotonic() - known.since)

    def is_failing(self, subject: str) -> bool:
        """Whether the last that was heard of a subject is a failure."""
        with self._lock:
            return subject in self._failing
