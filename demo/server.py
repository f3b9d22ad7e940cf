"""Run Shoal's commands as a user would, including a server."""

import http.client
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from demo.errors import DemoFailed
from demo.workspace import Workspace, short

_PREFERRED_PORT = 8765
_START_SECONDS = 120
_STOP_SECONDS = 40
_POLL_SECONDS = 0.05


def shoal() -> Path:
    """Return the path of this virtual environment's command `shoal`, relative to the current directory if possible."""
    return short(Path(sys.executable).parent / "shoal")


def run(command: Sequence[str]) -> str:
    """Run a command, and return its stdout. Raise DemoFailed if the command fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DemoFailed(f"{' '.join(command)} ended with {done.returncode}: {done.stderr or done.stdout}")
    return done.stdout


def free_port() -> int:
    """Return a TCP port on 127.0.0.1 that no process listens on."""
    for port in (_PREFERRED_PORT, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise OSError("no TCP port is free on 127.0.0.1")


def serve_command(workspace: Workspace, port: int) -> list[str]:
    """Return the command that serves the demo's store and follows its root."""
    at = ["--store", str(workspace.store), "--from", str(workspace.root)]
    return [str(shoal()), "serve", *at, "--workers", "2", "--port", str(port)]


@contextmanager
def serving(workspace: Workspace, port: int) -> Iterator[None]:
    """Start a server, wait until it is ready, and stop it at the end.

    Raises:
        DemoFailed: the server does not become ready in time, or exits with an error.
    """
    command = serve_command(workspace, port)
    with workspace.server_log.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait_until_ready(process, port, workspace.server_log)
        yield
        process.send_signal(signal.SIGTERM)
        if process.wait(_STOP_SECONDS):
            raise DemoFailed(f"{' '.join(command)} ended with {process.returncode}: {_last_words(workspace)}")
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not _is_ready(port):
        if process.poll() is not None or time.monotonic() > deadline:
            raise DemoFailed(f"the server was not ready in time; its log is {log}:\n{log.read_text()[-2000:]}")
        time.sleep(_POLL_SECONDS)


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _last_words(workspace: Workspace) -> str:
    return workspace.server_log.read_text()[-2000:]
