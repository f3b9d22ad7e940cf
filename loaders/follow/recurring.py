"""Log failures that repeat at every poll: a new message at once, and the same message again less and less often."""

import logging
import threading
from dataclasses import dataclass, field
from time import monotonic

_FIRST_SECONDS, _MOST_SECONDS = 60.0, 3600.0
_MESSAGES = 16
"""The maximum number of different messages per subject that are logged at once. Further messages are logged only at the
end of an interval."""


@dataclass
class _Failing:
    since: float
    again_at: float
    interval: float = _FIRST_SECONDS
    messages: set[str] = field(default_factory=set)


class RecurringFailures:
    """The current failures, by subject: a view, a table or an export root. Thread-safe."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._lock = threading.Lock()
        self._failing: dict[str, _Failing] = {}

    def failed(self, subject: str, message: str, level: int = logging.ERROR) -> None:
        """Log a failure, unless the same message was logged recently."""
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
        """Log that a failure is over, if there was one."""
        with self._lock:
            known = self._failing.pop(subject, None)
        if known is not None:
            self._log.info("%s: recovered after %.0f s", subject, monotonic() - known.since)

    def is_failing(self, subject: str) -> bool:
        """Return whether a subject's last outcome was a failure."""
        with self._lock:
            return subject in self._failing
