"""A process that looks up one request after the other, and when each lookup began and ended.

It is a process of its own because that is how a store is used: whoever applies deltas is another one.
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

from engine import FeatureStore
from perf.dataset import Dataset, key_lists

LOOKED_FOR_AN_END_EVERY = 64
"""Lookups from one time that the process looks whether it is to end until the next: that takes longer than a lookup."""


@dataclass
class Lookups:
    """Moments of the monotonic clock, in seconds, at which lookups began and ended; none before the process has."""

    began: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    ended: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(0))

    def seconds(self, start: float, end: float) -> npt.NDArray[np.float64]:
        """How long each lookup took that was under way at some time between two moments."""
        inside = (self.ended > start) & (self.began < end)
        return (self.ended - self.began)[inside]


@contextmanager
def reading(store: Path, data: Dataset, requests: Sequence[npt.NDArray[np.int64]]) -> Iterator[Lookups]:
    """Look up all features of these requests' documents, over and over, from a first round on that warmed up."""
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
    opened, references = FeatureStore.open(store), data.references
    entities = [{"doc_id": keys} for keys in key_lists(requests)]
    for asked in entities:
        opened.lookup_matrix(references, asked)
    # The keys are no garbage: looking through them for some would be counted as the store's.
    gc.freeze()
    began, ended = [], []
    other.send(None)
    for number, asked in enumerate(itertools.cycle(entities)):
        # It ends as well when its parent died.
        if number % LOOKED_FOR_AN_END_EVERY == 0 and other.poll():
            break
        began.append(time.perf_counter())
        opened.lookup_matrix(references, asked)
        ended.append(time.perf_counter())
    other.send((np.array(began), np.array(ended)))
