"""The life of one request, until its answer: the choice of replicas, retries, hedges, and the deadline.

A call does no input or output itself. A client asks for the call's `next` step, and reports the result of each attempt.
So both clients, for threads and for event loops, share every decision. Times are those of `time.monotonic`.
"""

import random
from collections.abc import Collection, Generator
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Literal, TypeVar

from shoal.client.errors import AnswerInvalid, DeadlineExceeded, NoAnswer, ServerError, ShoalError
from shoal.client.replicas import Replica, ReplicaSet
from shoal.client.wire import TIMEOUT_HEADER, Request, Response

Hedge = float | Literal["p95"] | None
Outcome = Response | ShoalError

_RETRIED = (429, 502, 503)
_OVERLOADED = ("Overloaded", "PushesFull")
_CLOSE_SECONDS = 0.002
"""An attempt that fails less than this time before its deadline counts as failed because of the deadline."""
_BACKOFF_SECONDS = 0.02
_LEAST_HEDGE_SECONDS = 0.001
_FIRST_HEDGE_SECONDS = 0.1
"""The delay before a hedge while there are too few answers for a 95th percentile."""


class Unreached(OSError):
    """A connection to a replica could not be made, so the replica did not see the request."""


@dataclass(frozen=True)
class Policy:
    """The limits for repeated requests. A request is sent at most `max_tries` times, hedges included. `hedge` is the
    delay before a hedge: a number of seconds, or "p95" for the 95th percentile of response times, or None for no
    hedges. At most `max_hedges` hedges are sent. Each hedge is sent when this delay has passed since the previous
    attempt."""

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
    """Whether no other attempt will start before this one ends or the deadline passes."""


@dataclass(frozen=True)
class Wait:
    """A step: do nothing until the time `until`, or until an attempt ends."""

    until: float


@dataclass(frozen=True)
class Done:
    """A step: the call is over. Attempts that are still in flight are no longer needed."""

    outcome: Outcome


Step = Attempt | Wait | Done


@dataclass(eq=False)
class Call:
    """A request to replicas, with the `deadline` of its answer.

    Args:
        target: the only replica that may get the request; None for any replica.
        avoid: replicas that get the request only if there is no other replica.
        not_before: the earliest time at which the request is sent.
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
        """Return the next step: send an attempt, wait, or return the outcome."""
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
        """Record the response to an attempt."""
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
        """Record that an attempt ended without a response."""
        if now >= attempt.deadline - _CLOSE_SECONDS:
            return  # The attempt ended at its deadline; `next` reports DeadlineExceeded.
        if not self._ended(attempt):
            return
        self.replicas.failed(attempt.replica, attempt.started, now)
        failure = NoAnswer(f"{attempt.replica.address.text} does not answer: {error or type(error).__name__}")
        self._fail(attempt, failure, now, 0.0, costs_nothing=isinstance(error, Unreached))

    def abandon(self) -> None:
        """Give the call up, because its result is no longer needed. Attempts in flight do not count for or against
        their replicas."""
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
        """Return whether one more attempt may run in parallel with the attempts in flight."""
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
        """Remove an attempt that ended; return whether the call still needed the attempt."""
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
        asked = ", ".join(attempt.replica.address.text for attempt in self.in_flight) or "none"
        before = f"; before that: {self._last_error}" if self._last_error is not None else ""
        return DeadlineExceeded(f"no answer in time; requests in flight: {asked}{before}")

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
    return AnswerInvalid(f"{response.address} answered with status {response.status}, which no Shoal server sends")
