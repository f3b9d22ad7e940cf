"""A process that reads a store from several threads, and checks that every answer is consistent in itself.

    python -m tests.consistency.reading STORE

It reads until its standard input closes. Then it prints, as JSON, how many lookups it made, which number each version
showed, and the errors.
"""

import gc
import json
import random
import sys
import threading
import time
import traceback
from pathlib import Path

from shoal import FeatureStore
from shoal.engine.lookup.columns import lookup
from tests.consistency.rows import FEATURES, KEYS, number_of

THREADS = 3


class Reading:
    """The results of all threads of a process."""

    def __init__(self, store: FeatureStore) -> None:
        self.store = store
        self.stop = threading.Event()
        self.lookups = 0
        self.numbers: dict[int, int] = {}
        self.errors: list[str] = []

    def run(self, seed: int) -> None:
        """Look up until told to stop. One thread in three holds each version for a long time."""
        try:
            if seed % THREADS:
                self._follow(random.Random(seed))
            else:
                self._hold(random.Random(seed))
        except BaseException:
            self.errors.append(traceback.format_exc())

    def _follow(self, source: random.Random) -> None:
        last = (0, 0)
        while not self.stop.is_set():
            keys = source.choices(range(KEYS), k=source.choice([5, 60]))
            result = self.store.lookup(FEATURES, {"doc_id": keys})
            number = number_of(result, keys)
            assert (result.version, number) >= last, f"{(result.version, number)} came after {last}"
            assert self.numbers.setdefault(result.version, number) == number, "a version showed two numbers"
            last = (result.version, number)
            self.lookups += 1
            time.sleep(0.005)

    def _hold(self, source: random.Random) -> None:
        while not self.stop.is_set():
            version = self.store.version()
            keys = source.choices(range(KEYS), k=30)
            first = lookup(version, FEATURES, {"doc_id": keys}, now=0)
            number = number_of(first, keys)
            until = time.monotonic() + source.uniform(0.1, 1.5)
            while time.monotonic() < until and not self.stop.is_set():
                assert number_of(lookup(version, FEATURES, {"doc_id": keys}, now=0), keys) == number
                assert number_of(first, keys) == number
                self.lookups += 1
                time.sleep(0.02)
            del version
            gc.collect()


def main() -> None:
    reading = Reading(FeatureStore.open(Path(sys.argv[1])))
    threads = [threading.Thread(target=reading.run, args=(seed,)) for seed in range(THREADS)]
    for thread in threads:
        thread.start()
    print("reading", flush=True)
    sys.stdin.read()
    reading.stop.set()
    for thread in threads:
        thread.join()
    found = {"lookups": reading.lookups, "numbers": reading.numbers, "errors": reading.errors}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
