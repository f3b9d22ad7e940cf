"""Load a root into a store in small chunks, as a process that stops where the caller asks.

    python -m tests.loaders.loading STORE ROOT CHUNK_BYTES [ROWS]

The process first prints how many rows it found in the store. After it encoded ROWS more rows it prints `waiting`, and
waits until it is killed. Without ROWS it loads everything and prints `done`.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

from shoal.engine.root.export_root import ExportRoot
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.follow import load
from shoal.loaders.follow.plan import ApplyDelta, LoadSnapshot
from shoal.loaders.segments import generation
from tests.stores import NullObserver


class Progress(NullObserver):
    """An observer that prints the number of rows found, and waits after a given number of rows."""

    def __init__(self, wait_at: int | None) -> None:
        self._wait_at = wait_at

    def started(self, step: LoadSnapshot | ApplyDelta) -> Callable[[int], None]:
        seen: list[int] = []

        def progress(rows: int) -> None:
            if not seen:
                print(rows, flush=True)
            seen.append(rows)
            if self._wait_at is not None and sum(seen[1:]) >= self._wait_at:
                print("waiting", flush=True)
                time.sleep(600)

        return progress


def main() -> None:
    store, root, chunk_bytes, *wait_at = sys.argv[1:]
    generation.CHUNK_BYTES = int(chunk_bytes)
    with StoreWriter(Path(store)) as writer:
        load.load(writer, ExportRoot(root), Progress(int(wait_at[0]) if wait_at else None))
    print("done", flush=True)


if __name__ == "__main__":
    main()
