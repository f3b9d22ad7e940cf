"""One request until it is answered: where it goes, when it goes again, and when the caller's time is over.

A call does nothing itself. Whoever carries it out asks for its `next` step, and tells what became of each attempt; so
threads and event loops share every decision. Times are those of `time.monotonic`.
"""

import random
from collections.abc import Collection, Generator
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Literal, TypeVar

from shoal_client.errors import AnswerInvalid, DeadlineExceeded, NoAnswer, ServerError, ShoalError
from shoal_client.replicas import Replica, ReplicaSet
from shoal_client.wire import TIMEOUT_HEADER, Request, Response

Hedge = float | Literal["p95"] | None
Outcome = Response | ShoalError

_RETRIED = (429, 502, 503)
_OVERLOADED = ("Overloaded", "PushesFull")
_CLOSE_SECONDS = 0.002
"""What ends so shortly before its deadline ended because of it."""
_BACKOFF_SECONDS = 0.02
_LEAST_HEDGE_SECONDS = 0.001
_FIRST_HEDGE_SECONDS = 0.1
"""What is waited before a hedge while too few answers came to tell their 95th percentile."""


class Unreached(OSError):
    """No connection to a replica was made, so the replica has not seen the request."""


@dataclass(frozen=True)
class Policy:
    """How requests are repeated: at most `max_tries` tries in all. `hedge` is the number of seconds after which a hedge
    is sent, or "p95" for the 95th percentile of response times, or None for never. At most `max_hedges` hedges are
    sent, each that long after the one before."""

    max_tries: int = 3
    hedge: Hedge = None
    max_hedges: int = 1


@dataclass(eq=False)
class Attempt:
    """A request on its way to a replica."""

    replica: Replica
    started: float
    deadline: float
    headers: dict[str, str]
    is_alone: bool
    """Whether no other attempt will be made before this one ends, or the deadline passes."""


@dataclass(frozen=True)
class Wait:
    """There is nothing to do until then, or until an attempt ends."""

    until: float


@dataclass(frozen=True)
class Done:
    """The call is over; attempts that are still on their way are of no use any more."""

    outcome: Outcome


Step = Attempt | Wait | Done


@dataclass(eq=False)
class Call:
    """A request to replicas, with the `deadline` of its answer.

    Args:
        target: the only replica that it may go to.
        avoid: replicas that it goes to only if there is no other.
        not_before: the earliest time at which it begins.
    """

    request: Request
    replicas: ReplicaSet
    policy: Policy
    deadline: float
    target: Replica | None = None
    avoid: Collection[Replica] = ()
    not_before: float = 0.0
    in_flight: list[Attempt] = field(default_factory=list)
    answered_by: Replica | None = None

    def __post_init__(self) -> None:
        self._tries = self._hedges = 0
        self._hedge_at: float | None = None
        self._outcome: Outcome | None = None
        self._last_error: ShoalError | None = None

    def next(self, now: float) -> Step:
        """What is to be done now."""
        if self._outcome is None and now >= self.deadline:
            self._end(self._too_late(), now)
        if self._outcome is not None:
            return Done(self._outcome)
        if not self.in_flight:
            return self._attempt(now) if now >= self.not_before else Wait(min(self.not_before, self.deadline))
        if self._hedge_at is not None and now >= self._hedge_at:
            self._hedge_at = None
            asked = [attempt.replica for attempt in self.in_flight]
            if self.replicas.has_other(now, asked) and self.replicas.hedges.take():
                self._hedges += 1
                self.avoid = asked
                return self._attempt(now)
        return Wait(self.deadline if self._hedge_at is None else min(self._hedge_at, self.deadline))

    def answered(self, attempt: Attempt, response: Response, now: float) -> None:
        """An attempt was answered."""
        if not self._ended(attempt):
            return
        if response.status not in _RETRIED:
            self.replicas.answered(attempt.replica, now - attempt.started)
            self.answered_by = attempt.replica
            self._end(_judged(response), now)
            return
        error = response.error()
        if response.status == 429 or error.code in _OVERLOADED:
            self.replicas.put_off(attempt.replica, response.retry_after or 0.0, now)
        else:
            self.replicas.failed(attempt.replica, attempt.started, now)
        self._fail(attempt, error, now, error.retry_after or 0.0)

    def failed(self, attempt: Attempt, error: Exception, now: float) -> None:
        """An attempt ended without an answer."""
        if now >= attempt.deadline - _CLOSE_SECONDS:
            return  # It ended at its deadline; `next` reports DeadlineExceeded.
        if not self._ended(attempt):
            return
        self.replicas.failed(attempt.replica, attempt.started, now)
        told = NoAnswer(f"{attempt.replica.address.text} does not answer: {error or type(error).__name__}")
        self._fail(attempt, told, now, 0.0, costs_nothing=isinstance(error, Unreached))

    def abandon(self) -> None:
        """Whoever wanted it wants it no more; attempts that are still on their way say nothing of their replicas."""
        for attempt in self.in_flight:
            self.replicas.dropped(attempt.replica)
        self.in_flight = []

    def _attempt(self, now: float) -> Attempt:
        if self._tries == 0:
            self.replicas.retries.count()
            self.replicas.hedges.count()
        self._tries += 1
        if self.target is None:
            replica = self.replicas.pick(now, self.avoid)
        else:
            replica = self.target
            self.replicas.begin(replica)
        if self._may_hedge():
            self._hedge_at = self._hedge_time(now)
        remaining = max(1, int(1000 * (self.deadline - now)))
        headers = {**self.request.headers, TIMEOUT_HEADER: str(remaining)}
        is_alone = self._hedge_at is None and not self.in_flight
        attempt = Attempt(replica, now, self.deadline, headers, is_alone)
        self.in_flight.append(attempt)
        return attempt

    def _may_hedge(self) -> bool:
        """Whether one more attempt may run beside those that have no answer yet."""
        is_allowed = self.request.may_hedge and self.target is None and len(self.replicas.replicas) > 1
        return is_allowed and self._hedges < self.policy.max_hedges and self._tries < self.policy.max_tries

    def _hedge_time(self, now: float) -> float | None:
        hedge = self.policy.hedge
        if hedge is None:
            return None
        if hedge == "p95":
            return now + max(_LEAST_HEDGE_SECONDS, self.replicas.p95 or _FIRST_HEDGE_SECONDS)
        return now + hedge

    def _ended(self, attempt: Attempt) -> bool:
        """Whether an attempt that ended was still of use."""
        if attempt not in self.in_flight:
            return False
        self.in_flight.remove(attempt)
        return True

    def _fail(
        self, attempt: Attempt, error: ShoalError, now: float, retry_after: float, *, costs_nothing: bool = False
    ) -> None:
        self._last_error = error
        if self.in_flight:
            return
        if not self.request.may_retry or self._tries >= self.policy.max_tries:
            self._end(error, now)
            return
        self.avoid = (attempt.replica,)
        if self.target is None and self.replicas.has_other(now, self.avoid):
            delay = 0.0
        else:
            delay = max(retry_after, _BACKOFF_SECONDS * 2 ** (self._tries - 1)) * random.uniform(1.0, 1.5)
            costs_nothing = False
        # A request that no replica has seen adds no load when another replica gets it.
        if now + delay >= self.deadline or not (costs_nothing or self.replicas.retries.take()):
            self._end(error, now)
            return
        self._hedge_at = None
        self.not_before = now + delay

    def _too_late(self) -> ShoalError:
        asked = ", ".join(attempt.replica.address.text for attempt in self.in_flight) or "nobody"
        before = f"; before that: {self._last_error}" if self._last_error is not None else ""
        return DeadlineExceeded(f"no answer in time: {asked} was being asked{before}")

    def _end(self, outcome: Outcome, now: float) -> None:
        self._outcome = outcome
        is_late = isinstance(outcome, DeadlineExceeded)
        for attempt in self.in_flight:
            if is_late:
                self.replicas.failed(attempt.replica, attempt.started, now)
            elif isinstance(outcome, ServerError):
                self.replicas.dropped(attempt.replica)
            else:
                self.replicas.lost(attempt.replica, now - attempt.started, now)
        self.in_flight = []


Result = TypeVar("Result")
Steps = Generator[list[Call], list[Outcome], Result]
"""An operation: yields calls, receives their outcomes in the same order, returns the result."""


def checked(outcome: Outcome) -> Response:
    """Return the response of a call's outcome, or raise its error."""
    if isinstance(outcome, ShoalError):
        raise outcome
    return outcome


def _judged(response: Response) -> Outcome:
    if response.status == HTTPStatus.OK:
        return response
    if response.status >= HTTPStatus.BAD_REQUEST:
        return response.error()
    return AnswerInvalid(f"{response.address} answered with status {response.status}, as no Shoal server does")
