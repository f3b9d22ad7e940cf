"""A client of the server, and a load made of several of them, each of which asks again once it has its answer."""

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
    """The content of an answer, and the version of the store that it came from."""

    content: bytes
    version: int

    def json(self) -> Any:
        """The content, if JSON was asked for."""
        return json.loads(self.content)

    def table(self) -> pa.Table:
        """The content, if Arrow was asked for."""
        return pa.ipc.open_stream(self.content).read_all()

    def matrix(self) -> npt.NDArray[Any]:
        """The content, if a NumPy matrix was asked for."""
        matrix: npt.NDArray[Any] = np.load(io.BytesIO(self.content))
        return matrix


class Client:
    """One connection, kept open."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_SECONDS)

    def lookup(self, body: bytes, accept: str = JSON) -> Answer:
        """POST /v1/lookup; raises DemoFailed."""
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
    """A request for `features=[...]` or `service=...`."""
    return json.dumps({**asked, "entities": entities}).encode()


@dataclass
class Measured:
    """What a load measured: the seconds that each answered request took, the versions in the order they were first
    seen, and the requests that failed, the first few by their errors."""

    wall_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    failed: int = 0
    errors: list[str] = field(default_factory=list)

    def milliseconds(self, percentile: float) -> float:
        """A percentile of the times."""
        return float(np.percentile(self.seconds, percentile)) * 1000

    @property
    def per_second(self) -> float:
        """Answers a second."""
        return len(self.seconds) / self.wall_seconds


class Load:
    """Runs `ask` in a closed loop on each of `connections` while the `with` lasts, `pause` seconds between requests."""

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
                except Exception as error:  # Whatever goes wrong in a thread has to be told by the one that waits.
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
