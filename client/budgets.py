"""A budget limits a client's extra requests (retries and hedges) to a share of its requests.

Without this limit, the client would multiply the load on an overloaded server.
"""

import threading
from time import monotonic

_SLOTS = 10
"""The number of past seconds in the budget. Each second has its own counters."""


class Budget:
    """A limit on extra requests: `share` times the requests of the last ten seconds, plus `reserve`.

    A budget may be used from several threads.
    """

    def __init__(self, share: float, reserve: int) -> None:
        self._share = share
        self._reserve = reserve
        self._lock = threading.Lock()
        self._second = int(monotonic())
        self._requests = [0] * _SLOTS
        self._extras = [0] * _SLOTS

    def count(self) -> None:
        """Count one request."""
        with self._lock:
            self._requests[self._slot()] += 1

    def take(self) -> bool:
        """Return whether one more extra request may be sent; if so, count it."""
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
