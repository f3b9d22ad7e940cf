"""Run as a process: load a root into a store in small chunks, and stop for good where the caller says.

    python -m tests.loaders.loading STORE ROOT CHUNK_BYTES [ROWS]

It prints how many rows it found there already. When ROWS more were encoded it prints `waiting`, and waits to be killed;
without ROWS it prints `done` at the end.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

from engine.export_root import ExportRoot
from loaders import generation, load
from loaders.follow import ApplyDelta, LoadSnapshot
from loaders.store_writer import StoreWriter
from tests.stores import Silence


class Progress(Silence):
    """Tells what was there, and waits at a place."""

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
