"""Room on the disk for the files in which prometheus_client keeps a process's counters.

They are maps with holes, and where a process first touches a page of one for which there is no room, it dies of SIGBUS.
So they are given their room before that; a process that gets none counts for itself alone, and lives.
"""

import logging
import os
from pathlib import Path

from prometheus_client import values

from engine.environment import allocate

log = logging.getLogger("shoal.worker")

# As `prometheus_client.values` names them, for the kinds that `engine.server.metrics` has.
_KINDS = ("counter", "histogram", "gauge_liveall")
_BYTES = 256 << 10


def allocate_metrics(directory: Path) -> None:
    """Make this process's files, before it makes its metrics."""
    files = [directory / f"{kind}_{os.getpid()}.db" for kind in _KINDS]
    try:
        for file in files:
            allocate(file, _BYTES)
    except OSError as error:
        for file in files:
            file.unlink(missing_ok=True)
        log.error("what this worker counts will be missing from /metrics: %s: %s", directory, error)
        values.ValueClass = values.MutexValue
