"""Which requests a worker takes on when more come than it can answer in time.

A worker answers one request after the other, in the order in which it read them. So when a request is read, its answer
can be foreseen: it comes after what the request has waited already, most of that in its socket, and after all that were
read before it. A request whose answer would come too late is refused there and then, in one of two cases:

- Its client said how long it waits.
- The worker has a standing queue, as CoDel defines it: over a whole interval the shortest wait stayed above a target. A
  pause of the machine, or a burst, is over by itself, and to refuse what waited for it would help nobody.

A refusal must cost next to nothing: what it costs to refuse nine of ten requests is missing for the tenth. It therefore
is made from the bytes that came, where they are one whole request of the ordinary kind, without parsing, task or
handler: a twentieth of the time of a small lookup.
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
"""A queue stands once the worker has worked for so long, by its own CPU time, and nothing told that the queue had
ended. A worker that gets no turn at a core cannot be said to have had too much to do."""
_TARGET_SHARE = 0.25
"""The target is this share of the timeout. While a queue stands, the waits are just below the timeout."""

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
    """One worker's. Times are in seconds, by one clock.

    Args:
        timeout: how long an answer may take while a queue stands, if its client does not say how long it waits.
        paths: where requests may be refused, those of Feast's endpoints apart: their errors look different.
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
            # Nothing was ahead of it. What it has waited for, if it has, was no queue.
            self._was_idle, self._queued_since = False, None

    def note_idle(self, met: int) -> None:
        """Note what the event loop found when it next looked at all sockets after an answer, before which it had met so
        many requests: if it has met no other one, there is no queue."""
        self._was_idle = self._was_idle or (met == self.met and not self._waiting)

    def take(self) -> int:
        """A request was read whose turn will come; returns how many are to be answered before it."""
        self._waiting += 1
        return self._waiting - 1

    def begin(self, ahead: int, read: float, arrived: float, now: float) -> None:
        """The turn of a request has come. Learn how long each takes, and whether requests wait for long."""
        self._waiting -= 1
        if ahead:
            # A pause that has nothing to do with requests must not look like the price of one for long.
            each = min((now - read) / ahead, 2 * self._seconds_each)
            self._seconds_each += _WEIGHT * (each - self._seconds_each)
        if not self._waiting and now - arrived <= _TARGET_SHARE * self.timeout:
            self._queued_since = None

    def has_standing_queue(self) -> bool:
        """Whether requests have waited for longer than the target for a whole interval, which begins with the first
        late one that this is asked for."""
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
