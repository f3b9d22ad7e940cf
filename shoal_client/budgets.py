"""A budget keeps what a client does on top of its requests to a share of them, lest it multiply an overload."""

import threading
from time import monotonic

_SLOTS = 10
"""Seconds that are looked back on, each counted by itself."""


class Budget:
    """So many extra requests as `share` of the requests of the last ten seconds, and `reserve` besides.

    It may be used from several threads.
    """

    def __init__(self, share: float, reserve: int) -> None:
        self._share = share
        self._reserve = reserve
        self._lock = threading.Lock()
        self._second = int(monotonic())
        self._requests = [0] * _SLOTS
        self._extras = [0] * _SLOTS

    def count(self) -> None:
        """A request was made."""
        with self._lock:
            self._requests[self._slot()] += 1

    def take(self) -> bool:
        """Whether one more extra request may be made; it counts, if so."""
        with self._lock:
            slot = self._slot()
            if sum(self._extras) + 1 > self._reserve + self._share * sum(self._requests):
                return False
            self._extras[slot] += 1
            return True

    def _slot(self) -> int:
        now = int(monotonic())
        for second in range(max(self._second, now - _SLOTS) + 1, now + 1):
            self._requests[second % _SLOTS] = self._extras[second % _SLOTS] = 0
        self._second = now
        return now % _SLOTS
