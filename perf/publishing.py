"""An exporter that publishes many deltas and some snapshots, and measures how long it takes until each is served.

The exporter runs in a separate process, by `perf.beside`. It also removes old entries from the root, because Shoal
leaves the removal to the owner of the root.
"""

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from perf.dataset import Dataset, publish_state
from perf.ledger import Ledger
from perf.traffic import Target
from shoal import FeatureStore
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.root.manifest import Manifest

_POLL_SECONDS = 0.002
_PATIENCE_SECONDS = 120.0


@dataclass(frozen=True)
class Rhythm:
    """The intervals between deltas and between snapshots in seconds, and the number of rows in a delta."""

    delta_seconds: float = 1.0
    snapshot_seconds: float = 90.0
    changed: int = 2_000


@dataclass
class Published:
    """The seconds from publishing to serving for each published entry, and the errors of the exporter."""

    deltas: list[float] = field(default_factory=list)
    snapshots: list[float] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)


class Source:
    """The source of one view: the number of the last change of each document, and its event time."""

    def __init__(self, root: ExportRoot, ledger: Ledger, pushed: int) -> None:
        self._root = root
        self._ledger = ledger
        self._pushed = pushed
        self._random = np.random.default_rng()
        self._changes = np.zeros(ledger.data.rows, np.int64)
        # Pushed rows have later event times, so they survive all snapshots.
        first = root.entry(ledger.data.view, 1).published_at
        self._event_times = np.full(ledger.data.rows, int(first.timestamp() * 1e6))

    @property
    def data(self) -> Dataset:
        """The data set of the view."""
        return self._ledger.data

    def publish_snapshot(self) -> Manifest:
        """Publish a snapshot of all documents. Then remove the entries before the previous snapshot from the root."""
        before = self._root.newest_snapshot(self.data.view)
        manifest = publish_state(self._root, self.data, self._changes, self._event_times)
        if before is not None:
            _prune(self._root, self.data.view, before)
        return manifest

    def publish_delta(self, count: int) -> tuple[Manifest, Callable[[], None]]:
        """Change `count` documents and publish a delta with them. Return the delta's manifest, and a function that the
        caller must call when the delta is served."""
        documents = self._random.choice(np.arange(self._pushed, self.data.rows), count, replace=False)
        self._changes[documents] += 1
        self._event_times[documents] = _now()
        changes: npt.NDArray[np.int64] = self._changes[documents]
        self._ledger.begun[documents] = changes

        def served() -> None:
            self._ledger.done[documents] = changes

        return publish_state(self._root, self.data, self._changes, self._event_times, documents), served


class Publisher:
    """The exporter in its process. Its first entry is a delta, because the first snapshots of the views already
    exist."""

    def __init__(self, target: Target, root: Path, store: Path, rhythm: Rhythm, stop: threading.Event) -> None:
        export_root = ExportRoot(root)
        views = range(len(target.views))
        self._sources = [Source(export_root, target.ledger(view), target.pushed) for view in views]
        self._store = store
        self._rhythm = rhythm
        self._stop = stop
        self._lock = threading.Lock()
        self._published = Published()
        self.threads = [self._publish]

    def take(self) -> Published:
        with self._lock:
            published = self._published
            self._published = Published()
            return published

    def fail(self, why: str) -> None:
        with self._lock:
            self._published.troubles.append(why)

    def _publish(self) -> None:
        reader = FeatureStore.open(self._store)
        number = 0
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
        """Wait until a published entry is served, and return the seconds.

        Raises:
            TimeoutError: the entry is not served in time.
        """
        started = time.monotonic()
        while (seconds := time.monotonic() - started) < _PATIENCE_SECONDS:
            # If one process sees a version, all processes see it: the version is in shared memory.
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
