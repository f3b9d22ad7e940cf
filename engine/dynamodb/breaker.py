"""A table that does not answer is not waited for by every request.

Source: the circuit breaker of M. Nygard, Release It!, 2007, ch. 5: closed, open for a while, and then half open, where
one request tries.
"""

import logging
import random
import time

log = logging.getLogger("shoal.remote")

FAILURES = 5
"""Requests in a row that got nothing from a table before it is left alone."""
COUNTED_FROM_SECONDS = 0.02
"""A request that waited less says nothing about the table, unless that refused it."""
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 8.0


class Breaker:
    """Whether one table is to be asked."""

    def __init__(self, table: str) -> None:
        self._table = table
        self._failures = 0
        self._pause = FIRST_PAUSE_SECONDS
        self._open_until = 0.0
        self._is_tried = False

    def may_ask(self) -> bool:
        """Whether a request may ask the table; who may says what came of it by one of the other methods."""
        if self._failures < FAILURES:
            return True
        if self._is_tried or time.monotonic() < self._open_until:
            return False
        self._is_tried = True
        return True

    def answered(self) -> None:
        """Something came."""
        if self._failures >= FAILURES:
            log.warning("table %r answers again", self._table)
        self._failures, self._pause, self._is_tried = 0, FIRST_PAUSE_SECONDS, False

    def failed(self) -> None:
        """Nothing came."""
        was_tried, self._is_tried = self._is_tried, False
        self._failures += 1
        if self._failures == FAILURES or was_tried:
            # Not all workers at the same time.
            pause = self._pause * random.uniform(0.5, 1.0)
            self._open_until = time.monotonic() + pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS)
            log.warning("table %r does not answer: it is asked again in %.1f s", self._table, pause)

    def given_up(self) -> None:
        """Nobody waited for what might have come."""
        self._is_tried = False
