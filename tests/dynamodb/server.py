"""A real server of DynamoDB's interface for tests: dynalite, as `make test` installs it. Its tables are in a directory
or in memory."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.s3.server import ACCESS as ACCESS
from tests.s3.server import free_port, listens
from tests.server.serving import eventually

INSTALLED = Path(__file__).parents[2] / ".dynamodb-server" / "node_modules" / "dynalite" / "cli.js"


def dynalite() -> list[str] | None:
    """Return the command of the server, or None if it is not installed."""
    node = shutil.which("node")
    return [node, str(INSTALLED)] if node and INSTALLED.exists() else None


@contextmanager
def running(command: list[str], log: Path) -> Iterator[str]:
    """Run a server that keeps its tables in memory, and yield its URL."""
    port = free_port()
    options = ["--host", "127.0.0.1", "--port", str(port), "--createTableMs", "0", "--deleteTableMs", "0"]
    with log.open("w") as output:
        process = subprocess.Popen([*command, *options], stdout=output, stderr=output, env=os.environ)
    try:
        eventually(lambda: listens(f"127.0.0.1:{port}", process), "the server of DynamoDB's interface")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()
