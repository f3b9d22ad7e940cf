"""Programs that deployments run beside Shoal, as processes."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def running(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> "Iterator[subprocess.Popen[bytes]]":
    """Run a process until the block ends. In `command`, `shoal` is the one installed beside this Python."""
    bin_directory = str(Path(sys.executable).parent)
    variables = os.environ | {"PATH": f"{bin_directory}:/usr/sbin:{os.environ['PATH']}"} | dict(environment or {})
    with log.open("a") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=variables)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(30)
