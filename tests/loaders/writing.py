"""A real writer process for tests.

    python -m tests.loaders.writing STORE ROOT POLL_SECONDS

It folds overlays of any number of rows, so that tests with small views also cover folds.
"""

import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shoal.engine.root.export_root import ExportRoot


@contextmanager
def running(
    store: Path, root: Path, *, poll_seconds: float, log: Path | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Run a writer process and yield it. If it still runs at the end, it is killed."""
    command = [sys.executable, "-m", "tests.loaders.writing", str(store), str(root), str(poll_seconds)]
    with subprocess.Popen(command, stderr=log.open("a") if log else None, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def main() -> None:
    from shoal.loaders.apply import compaction
    from shoal.loaders.writer import run_writer

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    compaction.FOLD_LEAST_ROWS = 0
    store, root, poll_seconds = sys.argv[1:]
    run_writer(Path(store), ExportRoot(root), poll_seconds=float(poll_seconds), scrub_hours=24)


if __name__ == "__main__":
    main()
