"""A process that reads a store directly, from several threads, while other clients ask the server.

    python -m tests.consistency.following STORE HISTORY

It reads until its standard input closes.
"""

import sys
import threading
from pathlib import Path

from shoal import FeatureStore
from tests.consistency import registers
from tests.consistency.clients import Client, note_read
from tests.consistency.history import History, Read, now
from tests.consistency.registers import VIEWS, Counts

THREADS = 2


class Follower(Client):
    """A client that reads a store that is open in this process."""

    def __init__(self, name: str, store: FeatureStore, history: History, counts: Counts, stop: threading.Event) -> None:
        super().__init__(name, history, counts, stop)
        self._store = store

    def act(self) -> None:
        self.read(registers.some_keys(self.source))

    def read(self, keys: list[int]) -> Read | None:
        begun = now()
        result = self._store.lookup(registers.FEATURES, {f"{view}_id": keys for view in VIEWS})
        return note_read(self.history, self.counts, self.name, begun, result.version, keys, result.to_pydict())


def main() -> None:
    store = FeatureStore.open(Path(sys.argv[1]))
    stop = threading.Event()
    with History(Path(sys.argv[2])) as history:
        threads = [Follower(f"process, thread {n}", store, history, Counts(), stop) for n in range(THREADS)]
        for thread in threads:
            thread.start()
        sys.stdin.read()
        stop.set()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
