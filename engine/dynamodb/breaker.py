"""The circuit breaker of a table: if the table does not answer, requests do not wait for the table.

Source: M. Nygard, Release It!, 2007, ch. 5. The breaker is closed at first. After several failures in a row it is open
for a while, and then half open. While the breaker is half open, one request tries the table.
"""

import logging
import random
import time

log = logging.getLogger("shoal.remote")

FAILURES = 5
"""The number of failed requests in a row after which the breaker opens."""
COUNTED_FROM_SECONDS = 0.02
"""A failed request counts only if it waited at least this long. A refusal by the table always counts."""
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 8.0


class Breaker:
    """The circuit breaker of one table."""

    def __init__(self, table: str) -> None:
        self._table = table
        self._failures = 0
        self._pause = FIRST_PAUSE_SECONDS
        self._open_until = 0.0
        self._is_tried = False

    def may_ask(self) -> bool:
        """Return whether a request may ask the table. If it may, the caller must afterwards call `answered`, `failed`
        or `given_up`."""
        if self._failures < FAILURES:
            return True
        if self._is_tried or time.monotonic() < self._open_until:
            return False
        self._is_tried = True
        return True

    def answered(self) -> None:
        """Record that the table answered."""
        if self._failures >= FAILURES:
            log.warning("table %r answers again", self._table)
        self._failures = 0
        self._pause = FIRST_PAUSE_SECONDS
        self._is_tried = False

    def failed(self) -> None:
        """Record that the table did not answer, or that it refused the request."""
        was_tried = self._is_tried
        self._is_tried = False
        self._failures += 1
        if self._failures == FAILURES or was_tried:
            # A random pause, so that not all workers try at the same time.
            pause = self._pause * random.uniform(0.5, 1.0)
            self._open_until = time.monotonic() + pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS)
            log.warning("table %r does not answer; the next request to it is in %.1f s", self._table, pause)

    def given_up(self) -> None:
        """Record that the caller stopped waiting too early to judge the table."""
        self._is_tried = False
