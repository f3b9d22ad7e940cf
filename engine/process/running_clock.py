"""A clock that stops while its process is stopped."""

import time

_LONGEST_STEP_SECONDS = 0.5


class RunningClock:
    """A count of the seconds in which this process ran. Its `now` must be called several times a second.

    A process that was stopped (SIGSTOP, a debugger, a frozen cgroup) or was not scheduled cannot judge what other
    processes did meanwhile, because they may have been stopped too. So a pause between two calls that is longer than
    half a second counts as half a second.
    """

    def __init__(self) -> None:
        self._looked = time.monotonic()
        self._now = 0.0

    def now(self) -> float:
        """Return the seconds counted so far."""
        looked = time.monotonic()
        self._now += min(looked - self._looked, _LONGEST_STEP_SECONDS)
        self._looked = looked
        return self._now
