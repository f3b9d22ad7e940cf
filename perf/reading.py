"""Run one lookup after the other in a separate process, and record when each lookup began and ended.

The lookups run in a separate process because that is how stores are used: a different process applies the deltas.
"""

import gc
import itertools
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import numpy.typing as npt

from perf.dataset import Dataset, key_lists
from shoal import FeatureStore

LOOKED_FOR_AN_END_EVERY = 64
"""The number of lookups between two checks of whether to stop. A check takes longer than a lookup."""


@dataclass
class Lookups:
    """The times at which lookups began and ended, in seconds of the monotonic clock. Empty until the process ends."""

    began: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    ended: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(0))

    def seconds(self, start: float, end: float) -> npt.NDArray[np.float64]:
        """Return the seconds of each lookup that was in progress at some time between `start` and `end`."""
        inside = (self.ended > start) & (self.began < end)
        return (self.ended - self.began)[inside]


@contextmanager
def reading(store: Path, data: Dataset, requests: Sequence[npt.NDArray[np.int64]]) -> Iterator[Lookups]:
    """Look up all features of the documents of these requests in a loop. The first round of the loop warms up and is
    not recorded. The recorded times are available when the context ends."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_look_up, args=(store, data, requests, there), daemon=True)
    process.start()
    there.close()
    lookups = Lookups()
    try:
        here.recv()
        yield lookups
        here.send(None)
        lookups.began, lookups.ended = here.recv()
    finally:
        here.close()
        process.join()


def _look_up(store: Path, data: Dataset, requests: Sequence[npt.NDArray[np.int64]], other: Connection) -> None:
    opened = FeatureStore.open(store)
    references = data.references
    entities = [{"doc_id": keys} for keys in key_lists(requests)]
    for asked in entities:
        opened.lookup_matrix(references, asked)
    # Exclude the keys from garbage collection, because a scan of the keys would count as time of the store.
    gc.freeze()
    began = []
    ended = []
    other.send(None)
    for number, asked in enumerate(itertools.cycle(entities)):
        # The loop also ends if the parent process has died.
        if number % LOOKED_FOR_AN_END_EVERY == 0 and other.poll():
            break
        began.append(time.perf_counter())
        opened.lookup_matrix(references, asked)
        ended.append(time.perf_counter())
    other.send((np.array(began), np.array(ended)))
