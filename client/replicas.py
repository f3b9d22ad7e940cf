"""Replicas are servers with the same data. Choose the replica for the next request, and eject failing replicas.

The client picks two replicas at random, and asks the one with fewer requests in flight (Mitzenmacher, "The Power of Two
Choices in Randomized Load Balancing"). A replica that does not answer is ejected for a while. This time doubles with
each further failure.
"""

import random
import threading
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from shoal.client.addresses import Address
from shoal.client.budgets import Budget
from shoal.client.errors import AddressInvalid

_FIRST_EJECTION_SECONDS = 0.5
_LONGEST_EJECTION_SECONDS = 30.0
_LOST_RACES = 2
"""If a hedge to another replica was faster this many times in a row, the slower replica counts as failing."""
_SAMPLES = 256
_LEAST_SAMPLES = 20
_RECOMPUTED_EVERY = 16


@dataclass(eq=False)
class Replica:
    """One server and its state. Times are those of `time.monotonic`."""

    address: Address
    in_flight: int = 0
    ejected_at: float = 0.0
    ejected_until: float = 0.0
    not_before: float = 0.0
    """The earliest time for the next request, from the replica's Retry-After header."""
    failures: int = 0
    lost_races: int = 0


@dataclass(frozen=True)
class Limits:
    """The limits on retries and hedges: shares of the requests of the last ten seconds, and reserves that are allowed
    in any case."""

    retry_share: float = 0.2
    retry_reserve: int = 10
    hedge_share: float = 0.05
    hedge_reserve: int = 5


@dataclass(eq=False)
class ReplicaSet:
    """Servers with the same data. All methods may be called from several threads."""

    addresses: Sequence[Address]
    limits: Limits
    replicas: list[Replica] = field(init=False)

    def __post_init__(self) -> None:
        texts = [address.text for address in self.addresses]
        if not texts or len(set(texts)) < len(texts):
            raise AddressInvalid(f"{', '.join(texts) or 'no addresses'}: give each server once, and at least one")
        self.replicas = [Replica(address) for address in self.addresses]
        self.retries = Budget(self.limits.retry_share, self.limits.retry_reserve)
        self.hedges = Budget(self.limits.hedge_share, self.limits.hedge_reserve)
        self._latencies: deque[float] = deque(maxlen=_SAMPLES)
        self._sampled = 0
        self._p95: float | None = None
        self._lock = threading.Lock()

    def pick(self, now: float, avoid: Collection[Replica] = ()) -> Replica:
        """Return the replica to ask next: a replica in `avoid` only if there is no other, and a failing replica only if
        all are failing."""
        with self._lock:
            others = [replica for replica in self.replicas if replica not in avoid] or self.replicas
            fit = [replica for replica in others if max(replica.ejected_until, replica.not_before) <= now]
            if not fit:
                # All are failing. Pick the replica that may be asked again soonest.
                chosen = min(others, key=lambda replica: max(replica.ejected_until, replica.not_before))
            else:
                chosen = min(random.sample(fit, min(2, len(fit))), key=lambda replica: replica.in_flight)
                if chosen.ejected_until:
                    # One request tries the ejected replica. Others avoid it until that request's result is known.
                    chosen.ejected_until = now + _FIRST_EJECTION_SECONDS
            chosen.in_flight += 1
            return chosen

    def begin(self, replica: Replica) -> None:
        """Record the start of a request to a replica that the caller chose, not `pick`."""
        with self._lock:
            replica.in_flight += 1

    def has_other(self, now: float, than: Collection[Replica]) -> bool:
        """Return whether there is another replica that is not failing."""
        with self._lock:
            return any(
                replica not in than and max(replica.ejected_until, replica.not_before) <= now
                for replica in self.replicas
            )

    def answered(self, replica: Replica, seconds: float) -> None:
        """Record that a replica answered in time."""
        with self._lock:
            replica.in_flight -= 1
            replica.failures = replica.lost_races = 0
            replica.ejected_until = replica.not_before = 0.0
            self._sample(seconds)

    def put_off(self, replica: Replica, seconds: float, now: float) -> None:
        """Record that a replica is overloaded; do not ask it again for some seconds."""
        with self._lock:
            replica.in_flight -= 1
            replica.not_before = now + min(seconds, _LONGEST_EJECTION_SECONDS)

    def failed(self, replica: Replica, started: float, now: float) -> None:
        """Record that a replica did not answer a request that began at `started`, or answered that it cannot serve."""
        with self._lock:
            replica.in_flight -= 1
            self._eject(replica, started, now)

    def lost(self, replica: Replica, seconds: float, now: float) -> None:
        """Record that another attempt got its answer first, while a replica had not answered for `seconds`."""
        with self._lock:
            replica.in_flight -= 1
            replica.lost_races += 1
            self._sample(seconds)
            if replica.lost_races >= _LOST_RACES:
                self._eject(replica, now - seconds, now)

    def dropped(self, replica: Replica) -> None:
        """Record that a request to a replica ended without information about the replica."""
        with self._lock:
            replica.in_flight -= 1

    @property
    def p95(self) -> float | None:
        """The 95th percentile of recent response times in seconds; None while there are too few answers."""
        return self._p95

    def _eject(self, replica: Replica, started: float, now: float) -> None:
        if started < replica.ejected_at:
            return  # The request was sent before the last ejection, so this is the same failure.
        replica.ejected_at = now
        seconds = min(_FIRST_EJECTION_SECONDS * 2**replica.failures, _LONGEST_EJECTION_SECONDS)
        replica.failures = min(replica.failures + 1, 10)
        replica.lost_races = 0
        replica.ejected_until = now + seconds * random.uniform(0.8, 1.2)

    def _sample(self, seconds: float) -> None:
        self._latencies.append(seconds)
        self._sampled += 1
        if self._sampled >= _LEAST_SAMPLES and self._sampled % _RECOMPUTED_EVERY == 0:
            self._p95 = sorted(self._latencies)[int(0.95 * len(self._latencies))]
