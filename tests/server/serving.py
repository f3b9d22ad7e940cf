"""Tools that start real servers, and send requests to them over real sockets."""

import http.client
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import psutil

from shoal.engine.process.control import unix_address
from shoal.engine.process.run_directory import ServerRecord, read_server_record

Seen = TypeVar("Seen")
PATIENCE_SECONDS = 90.0
"""The default time limit for `eventually`. It is long, because the writer yields to everything else on the machine."""


def eventually(
    look: Callable[[], Seen | None], what: str | Callable[[], str], seconds: float = PATIENCE_SECONDS
) -> Seen:
    """Return the first true result of `look`, or raise AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if seen := look():
            return seen
        time.sleep(0.02)
    raise AssertionError(f"not seen in {seconds:g} s: {what if isinstance(what, str) else what()}")


def is_gone(pid: int) -> bool:
    """Return whether a process has ended. A zombie counts as ended."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


@contextmanager
def standing_still(pid: int) -> Iterator[None]:
    """Stop a process, and let it continue at the end."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def version(self) -> int:
        return int(self.headers["x-shoal-version"])

    @property
    def error(self) -> tuple[str, str]:
        error = self.json["error"]
        return error["code"], error["message"]


class Connection:
    """One keep-alive connection. `tls` has the certificates that a client of an HTTPS server trusts and presents."""

    def __init__(self, address: str, tls: ssl.SSLContext | None = None) -> None:
        self._http: http.client.HTTPConnection
        if address.startswith("unix:"):
            self._http = http.client.HTTPConnection("localhost", timeout=PATIENCE_SECONDS)
            self._http.sock = socket.socket(socket.AF_UNIX)
            self._http.sock.settimeout(PATIENCE_SECONDS)
            with unix_address(Path(address.removeprefix("unix:"))) as path:
                self._http.sock.connect(path)
        elif address.startswith("https://"):
            host = address.removeprefix("https://")
            self._http = http.client.HTTPSConnection(host, timeout=PATIENCE_SECONDS, context=tls)
            self._http.connect()
        else:
            self._http = http.client.HTTPConnection(address.removeprefix("http://"), timeout=PATIENCE_SECONDS)
            self._http.connect()

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """Send a request and return its answer. A body that is not bytes is sent as JSON."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        self._http.request(method, path, data, headers)
        response = self._http.getresponse()
        content = response.read()
        return Answer(response.status, {name.lower(): value for name, value in response.headers.items()}, content)

    def close(self) -> None:
        self._http.close()


class Server:
    """A server in its own processes. `code` is another directory to run the code from, and `environment` has variables
    to add to the tests' own."""

    def __init__(
        self,
        store: Path,
        writer: Mapping[str, str | None] | None = None,
        *,
        tls: ssl.SSLContext | None = None,
        umask: int = -1,
        module: str = "tests.server.serve",
        code: Path | None = None,
        environment: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> None:
        self.store = store
        self.tls = tls
        self.log_path = store.parent / f"{store.name}.log"
        defaults = {"store": str(store), "port": 0, "workers": 2, "drain_seconds": 20.0}
        # A request that a test sends once must be answered, however busy the machine is.
        settings = defaults | {"request_timeout_ms": 60_000} | settings
        with self.log_path.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, json.dumps(settings), json.dumps(writer)],
                stderr=log,
                umask=umask,
                cwd=code,
                env=os.environ | ({"PYTHONPATH": str(code)} if code is not None else {}) | dict(environment or {}),
            )

    def __enter__(self) -> Self:
        eventually(self._answers, lambda: f"an answer from the server; its log is\n{self.log}")
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.send_signal(signal.SIGTERM)
        self.process.wait(PATIENCE_SECONDS)

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.log
        record = read_server_record(self.store)
        return record is not None and record.pid == self.process.pid and self.ask("GET", "/health").status == 200

    @property
    def record(self) -> ServerRecord:
        record = read_server_record(self.store)
        assert record is not None, self.log
        return record

    @property
    def grpc_address(self) -> str:
        found: list[str] = re.findall(r"listening for gRPC on (\S+)", self.log)
        assert found, self.log
        return found[-1]

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        connection = Connection(self.record.address, self.tls)
        try:
            yield connection
        finally:
            connection.close()

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """Send a request on a new connection."""
        with self.connection() as connection:
            return connection.ask(method, path, body, **headers)

    def lookup(self, features: Any, entities: dict[str, Any], **more: Any) -> Answer:
        return self.ask("POST", "/v1/lookup", {"features": features, "entities": entities} | more)

    def await_ready(self) -> None:
        eventually(
            lambda: self.ask("GET", "/ready").status == 200, lambda: f"a server that is ready; its log is\n{self.log}"
        )

    def await_views(self, *names: str) -> None:
        """Wait until these views are loaded; the server is ready as soon as the first view is."""

        def loaded() -> bool:
            answer = self.ask("GET", "/v1/views")
            return answer.status == 200 and {view["name"] for view in answer.json["views"]}.issuperset(names)

        eventually(loaded, lambda: f"the views {', '.join(names)}; the server's log is\n{self.log}")

    def raw_socket(self) -> socket.socket:
        """Return a socket connected to the server, for bytes that no HTTP client would send."""
        host, _, port = self.record.address.removeprefix("http://").rpartition(":")
        return socket.create_connection((host, int(port)), timeout=PATIENCE_SECONDS)

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait(PATIENCE_SECONDS)
