"""The files in which prometheus_client keeps a process's counters, and the allocation of their disk space.

The files are sparse, and are mapped into memory. When a process touches a page for the first time, and the disk has no
space for the page, the process dies of SIGBUS. So the disk space is allocated before the files are used. If the disk
has no space, the process counts only in its own memory, and survives.
"""

import logging
import os
from pathlib import Path

from prometheus_client import values

from shoal.engine.store.disk import allocate

log = logging.getLogger("shoal.worker")

# The kinds of the metrics in `shoal.engine.server.metrics`, with the names that `prometheus_client.values` uses.
_KINDS = ("counter", "histogram", "gauge_liveall")
_BYTES = 256 << 10


class MetricsFiles:
    """This process's files in the directory of all workers' counters. Create this object before the metrics."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._name = str(os.getpid())
        self._times_lost = 0
        self._is_missing = False
        self._told: str | None = None
        if self._allocate(self._name):
            values.ValueClass = values.MultiProcessValue(lambda: self._name)  # type: ignore[no-untyped-call]
        else:
            values.ValueClass = values.MutexValue

    def mend(self) -> None:
        """If two calls in a row find that files are missing, count from zero in new files, because the counts in
        removed files cannot be read."""
        was_missing = self._is_missing
        self._is_missing = any(not file.exists() for file in self._files(self._name))
        if values.ValueClass is values.MutexValue or not (was_missing and self._is_missing):
            return
        name = f"{os.getpid()}.{self._times_lost + 1}"
        if self.directory.is_dir() and self._allocate(name):
            self._times_lost += 1
            # With a new identifier, prometheus_client opens new files.
            self._name = name

    def _files(self, name: str) -> list[Path]:
        return [self.directory / f"{kind}_{name}.db" for kind in _KINDS]

    def _allocate(self, name: str) -> bool:
        """Create files under a name; return whether the disk had space for them."""
        files = self._files(name)
        try:
            for file in files:
                allocate(file, _BYTES)
        except OSError as error:
            for file in files:
                file.unlink(missing_ok=True)
            if str(error) != self._told:
                log.error("the counts of this worker will be missing from /metrics: %s: %s", self.directory, error)
            self._told = str(error)
            return False
        return True


def forget_process(directory: Path, pid: int) -> None:
    """Remove the gauges of a worker that has ended; its counters remain in the sums."""
    for file in (*directory.glob(f"gauge_live*_{pid}.db"), *directory.glob(f"gauge_live*_{pid}.*.db")):
        file.unlink(missing_ok=True)
