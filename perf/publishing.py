"""An exporter that publishes deltas all the time and snapshots now and then, and sees when they are served.

It is a process of its own, by `perf.beside`, and removes from the root what nobody needs any more, which Shoal leaves
to the root's owner.
"""

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engine import FeatureStore
from engine.export_root import ExportRoot
from engine.manifest import Manifest
from perf.dataset import Dataset, publish_state
from perf.ledger import Ledger
from perf.traffic import Target

_POLL_SECONDS = 0.002
_PATIENCE_SECONDS = 120.0


@dataclass(frozen=True)
class Rhythm:
    """How often what is published, in seconds from one to the next, and how many rows a delta has."""

    delta_seconds: float = 1.0
    snapshot_seconds: float = 90.0
    changed: int = 2_000


@dataclass
class Published:
    """What was published, and how many seconds it took until it was served."""

    deltas: list[float] = field(default_factory=list)
    snapshots: list[float] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)


class Source:
    """One view as its exporter has it: of each document the change that it is at, and since when."""

    def __init__(self, root: ExportRoot, ledger: Ledger, pushed: int) -> None:
        self._root = root
        self._ledger = ledger
        self._pushed = pushed
        self._random = np.random.default_rng()
        self._changes = np.zeros(ledger.data.rows, np.int64)
        # What is pushed is newer, and outlives all snapshots.
        first = root.entry(ledger.data.view, 1).published_at
        self._event_times = np.full(ledger.data.rows, int(first.timestamp() * 1e6))

    @property
    def data(self) -> Dataset:
        """The view."""
        return self._ledger.data

    def publish_snapshot(self) -> Manifest:
        """All documents as they are; all entries before the last snapshot go from the root."""
        before = self._root.newest_snapshot(self.data.view)
        manifest = publish_state(self._root, self.data, self._changes, self._event_times)
        if before is not None:
            _prune(self._root, self.data.view, before)
        return manifest

    def publish_delta(self, count: int) -> tuple[Manifest, Callable[[], None]]:
        """Change some documents, and what is to be called once that is served."""
        documents = self._random.choice(np.arange(self._pushed, self.data.rows), count, replace=False)
        self._changes[documents] += 1
        self._event_times[documents] = _now()
        changes: npt.NDArray[np.int64] = self._changes[documents]
        self._ledger.begun[documents] = changes

        def served() -> None:
            self._ledger.done[documents] = changes

        return publish_state(self._root, self.data, self._changes, self._event_times, documents), served


class Publisher:
    """The exporter in its process; it begins with a delta, the views' first snapshots being there."""

    def __init__(self, target: Target, root: Path, store: Path, rhythm: Rhythm, stop: threading.Event) -> None:
        export_root, views = ExportRoot(root), range(len(target.views))
        self._sources = [Source(export_root, target.ledger(view), target.pushed) for view in views]
        self._store = store
        self._rhythm = rhythm
        self._stop = stop
        self._lock = threading.Lock()
        self._published = Published()
        self.threads = [self._publish]

    def take(self) -> Published:
        with self._lock:
            published, self._published = self._published, Published()
            return published

    def fail(self, why: str) -> None:
        with self._lock:
            self._published.troubles.append(why)

    def _publish(self) -> None:
        reader, number = FeatureStore.open(self._store), 0
        due = time.monotonic()
        snapshot_due = due + self._rhythm.snapshot_seconds
        snapshots = 0
        while not self._stop.wait(max(0.0, due - time.monotonic())):
            source = self._sources[number % len(self._sources)]
            manifest, served = source.publish_delta(self._rhythm.changed)
            seconds = self._await(reader, manifest)
            served()
            with self._lock:
                self._published.deltas.append(seconds)
            if time.monotonic() > snapshot_due:
                seconds = self._await(reader, self._sources[snapshots % len(self._sources)].publish_snapshot())
                with self._lock:
                    self._published.snapshots.append(seconds)
                snapshots += 1
                snapshot_due += self._rhythm.snapshot_seconds
            number += 1
            due = max(due + self._rhythm.delta_seconds, time.monotonic() - self._rhythm.delta_seconds)

    def _await(self, reader: FeatureStore, manifest: Manifest) -> float:
        """Seconds until an entry that has just been published is served."""
        started = time.monotonic()
        while (seconds := time.monotonic() - started) < _PATIENCE_SECONDS:
            # What one process sees all see: the version is in memory that they share.
            if reader.version().view(manifest.view.name).record.applied_seq >= manifest.seq:
                return seconds
            time.sleep(_POLL_SECONDS)
        raise TimeoutError(f"{manifest.view.name}: entry {manifest.seq} is not served {_PATIENCE_SECONDS:g} s later")


def _now() -> int:
    return time.time_ns() // 1000


def _prune(root: ExportRoot, view: str, oldest_kept: Manifest) -> None:
    for seq in root.sequence_numbers(view):
        if seq < oldest_kept.seq:
            shutil.rmtree(root.path / view / "deltas" / f"{seq:012d}")
    for snapshot_id in root.snapshot_ids(view):
        if snapshot_id < oldest_kept.snapshot_id:
            shutil.rmtree(root.path / view / "snapshots" / snapshot_id)
