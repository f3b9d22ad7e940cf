"""A client of the server, and a load of several clients. Each client sends its next request after it received the last
answer."""

import http.client
import io
import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from demo.errors import DemoFailed

JSON = "application/json"
ARROW = "application/vnd.apache.arrow.stream"
NPY = "application/x-npy"

_TIMEOUT_SECONDS = 30
_REPORTED_FAILURES = 3


@dataclass(frozen=True)
class Answer:
    """The body of a response, and the version of the store that it was read from."""

    content: bytes
    version: int

    def json(self) -> Any:
        """Return the content of a JSON response."""
        return json.loads(self.content)

    def table(self) -> pa.Table:
        """Return the content of an Arrow response."""
        return pa.ipc.open_stream(self.content).read_all()

    def matrix(self) -> npt.NDArray[Any]:
        """Return the content of a NumPy response."""
        matrix: npt.NDArray[Any] = np.load(io.BytesIO(self.content))
        return matrix


class Client:
    """A client with one connection, which stays open."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_SECONDS)

    def lookup(self, body: bytes, accept: str = JSON) -> Answer:
        """Send POST /v1/lookup, and return the response. Raise DemoFailed if the request fails."""
        try:
            self._connection.request("POST", "/v1/lookup", body, {"Content-Type": JSON, "Accept": accept})
            response = self._connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise DemoFailed(repr(error)) from error
        if response.status != http.client.OK:
            raise DemoFailed(f"{response.status} {content.decode(errors='replace')}")
        return Answer(content, int(response.headers["X-Shoal-Version"]))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()


def body(entities: Mapping[str, Any], **asked: Any) -> bytes:
    """Return the body of a lookup request for `features=[...]` or `service=...`."""
    return json.dumps({**asked, "entities": entities}).encode()


@dataclass
class Measured:
    """The measurements of a load: the seconds of each successful request, the store versions in the order in which they
    first appeared, the number of failed requests, and the first few errors."""

    wall_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    failed: int = 0
    errors: list[str] = field(default_factory=list)

    def milliseconds(self, percentile: float) -> float:
        """Return a percentile of the request times in milliseconds."""
        return float(np.percentile(self.seconds, percentile)) * 1000

    @property
    def per_second(self) -> float:
        """The rate of successful requests per second."""
        return len(self.seconds) / self.wall_seconds


class Load:
    """Runs `ask` in a closed loop on each of `connections` connections during a `with` block.

    Each loop pauses for `pause` seconds between requests.
    """

    def __init__(self, port: int, ask: Callable[[Client], Answer], *, connections: int = 2, pause: float = 0) -> None:
        self._port = port
        self._ask = ask
        self._pause = pause
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(connections)]
        self.measured = Measured()

    def __enter__(self) -> Measured:
        self._started = time.perf_counter()
        for thread in self._threads:
            thread.start()
        return self.measured

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self.measured.wall_seconds = time.perf_counter() - self._started

    def _run(self) -> None:
        with Client(self._port) as client:
            while not self._stop.wait(self._pause) if self._pause else not self._stop.is_set():
                started = time.perf_counter()
                try:
                    answer = self._ask(client)
                except Exception as error:  # This thread cannot raise it: the main thread reports all failures.
                    self._note_failure(error)
                else:
                    self._note(answer.version, time.perf_counter() - started)

    def _note(self, version: int, seconds: float) -> None:
        with self._lock:
            self.measured.seconds.append(seconds)
            if version not in self.measured.versions:
                self.measured.versions.append(version)

    def _note_failure(self, error: Exception) -> None:
        with self._lock:
            self.measured.failed += 1
            if len(self.measured.errors) < _REPORTED_FAILURES:
                self.measured.errors.append(repr(error))
        self._stop.wait(0.1)
