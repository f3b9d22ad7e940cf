"""Load shedding: which requests a worker accepts when more arrive than it can answer in time.

A worker answers one request after the other, in the order in which it read them. So when a request is read, the time of
its answer can be predicted from the time that it has already waited, mostly in its socket, and from the requests that
were read before it. If the answer would be too late, the request is rejected at once, in one of two cases:

- Its client said how long it waits.
- The worker has a standing queue, as CoDel defines it: over a whole interval the shortest wait stayed above a target. A
  queue after a pause of the machine, or after a burst, ends by itself, and rejecting its requests would help nobody.

A rejection must cost next to nothing, because the CPU that it takes to reject nine of ten requests is missing for the
tenth. So it is decided from the received bytes, without parsing, task or handler, if they are one whole ordinary
request. That takes a twentieth of the time of a small lookup.
"""

import re
import time
from collections.abc import Iterable

import orjson

from engine.errors import DeadlineInvalid, Overloaded

TIMEOUT_HEADER = "X-Request-Timeout-Ms"
_LONGEST_TIMEOUT_MS = 24 * 3600 * 1000

_FIRST_GUESS_SECONDS = 0.001
_WEIGHT = 0.05
_SHARE_WHEN_READ = 0.75
"""What of its time a request may be foreseen to take. The rest is for what cannot be foreseen: other processes' turns
at the core, larger requests among those ahead, and the network."""
_SHARE_WHEN_BEGUN = 0.9

_INTERVAL_SECONDS = 0.25
"""A queue is standing if it has not ended within this much CPU time of the worker. Wall time would not do: a worker
that is not scheduled is not overloaded."""
_TARGET_SHARE = 0.25
"""The target is this share of the timeout. In a standing queue, requests wait for almost the timeout."""

_WHOLE = re.compile(rb"POST (\S+) HTTP/1\.1\r\n")
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+) *\r\n", re.IGNORECASE)
_TIMEOUT = re.compile(rb"\r\nx-request-timeout-ms: *([^\r]*?) *\r\n", re.IGNORECASE)
_SPECIAL = re.compile(rb"\r\n(?:connection: *close|expect:|transfer-encoding:)", re.IGNORECASE)


def timeout_seconds(text: str) -> float:
    """What a client says in milliseconds of how long it waits.

    Raises:
        DeadlineInvalid: it is no such time.
    """
    milliseconds = int(text) if text.isascii() and text.isdigit() and len(text) <= 8 else 0
    if not 0 < milliseconds <= _LONGEST_TIMEOUT_MS:
        raise DeadlineInvalid(
            f"{TIMEOUT_HEADER} is {text[:20]!r}; give the milliseconds that you wait for an answer, 1 to "
            f"{_LONGEST_TIMEOUT_MS}"
        )
    return milliseconds / 1e3


class Admission:
    """The admission of one worker. All times are in seconds of the same clock.

    Args:
        timeout: how long an answer may take during a standing queue, if the client sets no deadline.
        paths: paths whose requests may be rejected. Feast's endpoints are separate, because their errors have another
            form.
    """

    def __init__(self, timeout: float, paths: Iterable[str], feast_paths: Iterable[str]) -> None:
        self.timeout = timeout
        self.is_draining = False
        self._waiting = 0
        self._seconds_each = _FIRST_GUESS_SECONDS
        self._refused = 0
        self.met = 0
        """How many requests were read."""
        self._was_idle = True
        self._queued_since: float | None = None
        message = "the worker has more to do than it can do in time; try again later"
        error = {"error": {"code": Overloaded.__name__, "message": message}}
        self._refusals = {path.encode(): _refusal(error) for path in paths}
        self._refusals |= {path.encode(): _refusal({"detail": message}) for path in feast_paths}

    def meet(self) -> None:
        """Note that a request was read, before it is decided whether to take it."""
        self.met += 1
        if self._was_idle:
            # No request was ahead of it, so its wait, if any, was not caused by a queue.
            self._was_idle, self._queued_since = False, None

    def note_idle(self, met: int) -> None:
        """Note the result of the event loop's next poll of all sockets after an answer. If it has read no request
        beyond the `met` ones from before the answer, there is no queue."""
        self._was_idle = self._was_idle or (met == self.met and not self._waiting)

    def take(self) -> int:
        """A request was read whose turn will come; returns how many are to be answered before it."""
        self._waiting += 1
        return self._waiting - 1

    def begin(self, ahead: int, read: float, arrived: float, now: float) -> None:
        """Begin a request. Update the mean time per request, and whether requests wait for long."""
        self._waiting -= 1
        if ahead:
            # A pause that has nothing to do with requests must not look like the price of one for long.
            each = min((now - read) / ahead, 2 * self._seconds_each)
            self._seconds_each += _WEIGHT * (each - self._seconds_each)
        if not self._waiting and now - arrived <= _TARGET_SHARE * self.timeout:
            self._queued_since = None

    def has_standing_queue(self) -> bool:
        """Whether requests have waited for longer than the target for a whole interval. The interval begins with the
        first call for a late request."""
        if self._queued_since is None:
            self._queued_since = time.thread_time()
        return time.thread_time() - self._queued_since > _INTERVAL_SECONDS

    def drop(self) -> None:
        """It has gone before its turn came."""
        self._waiting -= 1

    def is_late_when_read(self, waited: float, timeout: float) -> bool:
        """Whether one that is read now, and has waited before that, would be answered too late."""
        return waited + (self._waiting + 1) * self._seconds_each > _SHARE_WHEN_READ * timeout

    def is_late_when_begun(self, waited: float, timeout: float) -> bool:
        """Whether one whose turn has come would be."""
        return waited + self._seconds_each > _SHARE_WHEN_BEGUN * timeout

    def refusal(self, data: bytes, waited: float) -> bytes | None:
        """The whole answer to what came over an idle connection, if it is a request that is to be refused: None if it
        is not, or not one of the ordinary kind, whose turn is to be waited for."""
        line, end = _WHOLE.match(data), data.find(b"\r\n\r\n")
        if line is None or end < 0 or self.is_draining or (answer := self._refusals.get(line[1])) is None:
            return None
        length = _LENGTH.search(data, 0, end + 2)
        if length is None or int(length[1]) != len(data) - end - 4 or _SPECIAL.search(data, 0, end):
            return None
        if asked := _TIMEOUT.search(data, 0, end + 2):
            try:
                timeout = timeout_seconds(asked[1].decode("latin-1"))
            except DeadlineInvalid:
                return None
            if not self.is_late_when_read(waited, timeout):
                return None
        elif not self.has_standing_queue():
            return None
        self._refused += 1
        return answer

    def take_refused(self) -> int:
        """How many were refused as they came, since the last call."""
        refused, self._refused = self._refused, 0
        return refused


def _refusal(document: object) -> bytes:
    body = orjson.dumps(document)
    head = "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
