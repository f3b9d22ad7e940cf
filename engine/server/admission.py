"""Load shedding: which requests a worker accepts when more arrive than it can answer in time.

A worker answers one request after the other, in the order in which it read them. So when the worker reads a request, it
can predict the time of the answer. The prediction uses the time that the request has already waited, mostly in its
socket, and the number of requests ahead of it. If the answer would be too late, the request is rejected at once in two
cases:

- The client has set a timeout.
- The worker has a standing queue, as CoDel defines it: the shortest wait stayed above a target for a whole interval. A
  queue after a pause of the machine, or after a burst, ends by itself, and rejecting its requests would help nobody.

A rejection must take almost no CPU time: if nine of ten requests are rejected, the CPU time of these rejections is not
available for the tenth request. So if the received bytes are exactly one ordinary request, the worker decides from the
bytes alone. It does not parse the request, and starts no task and no handler. Such a rejection takes a twentieth of the
time of a small lookup.
"""

import re
import time
from collections.abc import Iterable

import orjson

from shoal.engine.base.errors import DeadlineInvalid, Overloaded

TIMEOUT_HEADER = "X-Request-Timeout-Ms"
_LONGEST_TIMEOUT_MS = 24 * 3600 * 1000

_FIRST_GUESS_SECONDS = 0.001
_WEIGHT = 0.05
_SHARE_WHEN_READ = 0.75
"""The share of a request's timeout that the predicted time of its answer may take. The rest is a reserve for what
cannot be predicted: other processes on the core, larger requests ahead in the queue, and the network."""
_SHARE_WHEN_BEGUN = 0.9

_INTERVAL_SECONDS = 0.25
"""A queue counts as a standing queue if it has not ended within this much CPU time of the worker. Wall time is
unsuitable: a worker that is not scheduled is not overloaded."""
_TARGET_SHARE = 0.25
"""The target for waits, as a share of the timeout. In a standing queue, requests wait for almost the whole timeout."""

_WHOLE = re.compile(rb"POST (\S+) HTTP/1\.1\r\n")
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+) *\r\n", re.IGNORECASE)
_TIMEOUT = re.compile(rb"\r\nx-request-timeout-ms: *([^\r]*?) *\r\n", re.IGNORECASE)
_SPECIAL = re.compile(rb"\r\n(?:connection: *close|expect:|transfer-encoding:)", re.IGNORECASE)


def timeout_seconds(text: str) -> float:
    """Return a client's timeout in seconds, from a header value in milliseconds.

    Raises:
        DeadlineInvalid: the value is not a valid timeout.
    """
    milliseconds = int(text) if text.isascii() and text.isdigit() and len(text) <= 8 else 0
    if not 0 < milliseconds <= _LONGEST_TIMEOUT_MS:
        raise DeadlineInvalid(
            f"{TIMEOUT_HEADER} is {text[:20]!r}; give the milliseconds that you wait for an answer, 1 to "
            f"{_LONGEST_TIMEOUT_MS}"
        )
    return milliseconds / 1e3


class Admission:
    """The load shedding of one worker. All times are in seconds of the same clock.

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
        """The number of requests that were read."""
        self._was_idle = True
        self._queued_since: float | None = None
        message = "the worker is overloaded and cannot answer in time; try again later"
        error = {"error": {"code": Overloaded.__name__, "message": message}}
        self._refusals = {path.encode(): _refusal(error) for path in paths}
        self._refusals |= {path.encode(): _refusal({"detail": message}) for path in feast_paths}

    def meet(self) -> None:
        """Count a request that was read. Call this before the decision to accept or reject the request."""
        self.met += 1
        if self._was_idle:
            # No request was ahead of this request. If this request has waited, the wait was not caused by a queue.
            self._was_idle, self._queued_since = False, None

    def note_idle(self, met: int) -> None:
        """Note whether there is a queue. Call this when the event loop has polled all sockets once after an answer.
        `met` is the number of requests that had been read at the time of the answer. If no more requests were read
        since then, there is no queue."""
        self._was_idle = self._was_idle or (met == self.met and not self._waiting)

    def take(self) -> int:
        """Add a request to the queue; return the number of requests ahead of it."""
        self._waiting += 1
        return self._waiting - 1

    def begin(self, ahead: int, read: float, arrived: float, now: float) -> None:
        """Begin a request: update the mean time per request, and end the standing queue if waits are short."""
        self._waiting -= 1
        if ahead:
            # Limit the effect of a pause of the process, because a pause says nothing about the cost of a request.
            each = min((now - read) / ahead, 2 * self._seconds_each)
            self._seconds_each += _WEIGHT * (each - self._seconds_each)
        if not self._waiting and now - arrived <= _TARGET_SHARE * self.timeout:
            self._queued_since = None

    def has_standing_queue(self) -> bool:
        """Return whether waits have exceeded the target for a whole interval. The interval begins with the first
        call for a late request."""
        if self._queued_since is None:
            self._queued_since = time.thread_time()
        return time.thread_time() - self._queued_since > _INTERVAL_SECONDS

    def drop(self) -> None:
        """Remove a request from the queue, because its client disconnected before the request began."""
        self._waiting -= 1

    def is_late_when_read(self, waited: float, timeout: float) -> bool:
        """Return whether a request that is read now, after `waited` seconds, would be answered too late."""
        return waited + (self._waiting + 1) * self._seconds_each > _SHARE_WHEN_READ * timeout

    def is_late_when_begun(self, waited: float, timeout: float) -> bool:
        """Return whether a request that begins now, after `waited` seconds, would be answered too late."""
        return waited + self._seconds_each > _SHARE_WHEN_BEGUN * timeout

    def refusal(self, data: bytes, waited: float) -> bytes | None:
        """Return the complete response that rejects a request; return None if the request is not rejected. `data`
        contains the bytes that were received on an idle connection. If `data` is not exactly one ordinary request, the
        request is not rejected here, and waits for its turn."""
        line = _WHOLE.match(data)
        end = data.find(b"\r\n\r\n")
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
        """Return how many requests `refusal` has rejected since the last call."""
        refused = self._refused
        self._refused = 0
        return refused


def _refusal(document: object) -> bytes:
    body = orjson.dumps(document)
    head = "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
