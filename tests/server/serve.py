"""A real server for tests: `python -m tests.server.serve SETTINGS WRITER`, both JSON.

WRITER is null for no writer, {"root": DIRECTORY} for the real writer, {"root": null} for the real writer without a
root, or {"log": FILE} for a writer that only logs the signals that it receives. The environment variable OPEN_FILES
limits the number of open files.
"""

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from shoal.engine.root.export_root import ExportRoot
from shoal.engine.server.run import run
from shoal.engine.server.settings import server_settings
from shoal.loaders.warming import warm
from shoal.loaders.writer import run_writer


def note_signals(log: Path) -> None:
    """Append a line to the log at the start and for every signal, until SIGTERM arrives."""
    received = ["started"]
    # Signal handlers are needed: another thread of the process, which does not block the signals, may receive them.
    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, lambda number, frame: received.append(signal.Signals(number).name))
    noted = 0
    while "SIGTERM" not in received:
        new = received[noted:]
        noted += len(new)
        with log.open("a") as file:
            file.writelines(f"{os.getpid()} {what}\n" for what in new)
        time.sleep(0.02)


def writer_for(store: Path, choice: dict[str, str | None] | None, scrub_hours: float) -> Callable[[], None] | None:
    if choice is None:
        return None
    if log := choice.get("log"):
        return partial(note_signals, Path(log))
    root = choice["root"]
    followed = ExportRoot(root) if root is not None else None
    return partial(run_writer, store, followed, poll_seconds=0.5, scrub_hours=scrub_hours)


if __name__ == "__main__":
    if files := os.environ.get("OPEN_FILES"):
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(files), int(files)))
    settings: dict[str, Any] = json.loads(sys.argv[1])
    checked = server_settings(**settings)
    choice: dict[str, str | None] | None = json.loads(sys.argv[2])
    follows = choice is not None and choice.get("root") is not None
    writer = writer_for(checked.store, choice, checked.scrub_hours)
    run(checked, writer, follows=follows, warm_writer=warm if writer is not None else None)
