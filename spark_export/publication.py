"""Put a run's files where readers find them: staged aside, moved into place, and then made to exist by one manifest.

Exporters may race. Each writes under names of its own, and the log's manifest decides between them; one that lost, or
failed, takes away what it had moved.
"""

import os
import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow.parquet as pq

from engine.directory_storage import sync_directory
from engine.errors import ManifestInvalid, NotPublished, RootNotWritable
from engine.export_root import MANIFEST, ExportRoot, file_checksum
from engine.failpoints import reached
from engine.keys import KEY_HASH
from engine.manifest import Manifest, PublishedFile

_ABANDONED_AFTER = 24 * 3600
_THREADS = 4
PARTS = "part-*.parquet"


class Staging:
    """The directory that a run writes in before it publishes; `run` is the id of the entry that it may become."""

    def __init__(self, root: ExportRoot, view: str, run: str) -> None:
        self.root = root
        self.run = run
        self.directory = root.path / view / "_staging" / run
        self.parts = self.directory / "parts"
        self.ledger = self.directory / "ledger"

    def files(self) -> tuple[PublishedFile, ...]:
        """Name the parts that Spark wrote for good, make them durable, and describe them, ordered by key hash."""
        paths: list[Path] = []
        for path in sorted(self.parts.glob(PARTS)):
            # Spark writes a file for its first partition even if that has no rows.
            if pq.read_metadata(path).num_rows:
                paths.append(path.rename(self.parts / f"part-{self.run[:8]}-{len(paths):05d}.parquet"))
        with ThreadPoolExecutor(_THREADS) as threads:
            return tuple(threads.map(_describe, paths))

    def publish(self, manifest: Manifest) -> None:
        """Move the parts and the ledger to where `manifest` says they are, and publish it.

        Raises:
            PublicationLost: the log has an entry of that seq already.
            RootNotWritable: the root's file system refuses it.
        """
        directory, state = self.root.directory(manifest), state_directory(self.root, manifest)
        assert state is not None
        try:
            with writing(self.root):
                directory.mkdir(parents=True, exist_ok=True)
                state.parent.mkdir(exist_ok=True)
                for file in manifest.files:
                    (self.parts / file.path).rename(directory / file.path)
                reached("export.parts-moved")
                for path in self.ledger.glob(PARTS):
                    _make_durable(path)
                self.ledger.rename(state)
                reached("export.state-moved")
                for path in (directory, directory.parent, state, state.parent, state.parent.parent, self.root.path):
                    sync_directory(path)
                self.root.publish(manifest)
        except BaseException:
            if not _is_published(self.root, manifest):
                _take_away(manifest, directory, state)
            raise
        reached("export.published")


@contextmanager
def staging(root: ExportRoot, view: str, run: str) -> Iterator[Staging]:
    """A run's staging directory while the run lasts. What runs left that ended long ago goes, too.

    Raises:
        RootNotWritable: the root's file system refuses it.
    """
    stage = Staging(root, view, run)
    with writing(root):
        stage.directory.mkdir(parents=True)
    try:
        for other in (*stage.directory.parent.iterdir(), *_unlisted_snapshots(root, view)):
            if time.time() - _last_change(other) > _ABANDONED_AFTER:
                shutil.rmtree(other, ignore_errors=True)
        yield stage
    finally:
        shutil.rmtree(stage.directory, ignore_errors=True)


@contextmanager
def writing(root: ExportRoot) -> Iterator[None]:
    """Raise what the root's file system refuses as RootNotWritable."""
    try:
        yield
    except OSError as error:
        raise RootNotWritable(
            f"export root {root} cannot be written: {error}; check its permissions and the space on its disk"
        ) from error


def state_directory(root: ExportRoot, manifest: Manifest) -> Path | None:
    """Where the ledger lies that the run after this entry starts from; None if the entry names none."""
    return root.path / manifest.view.name / "state" / manifest.state if manifest.state else None


def state_directories(root: ExportRoot, view: str) -> list[Path]:
    """All ledgers that lie in a view's `state` directory."""
    return sorted((root.path / view / "state").glob("*/"))


def remove_states(states: Iterable[Path]) -> None:
    """Remove ledgers that no run will start from any more."""
    for state in states:
        shutil.rmtree(state, ignore_errors=True)


def _describe(path: Path) -> PublishedFile:
    _make_durable(path)
    metadata = pq.read_metadata(path)
    position = metadata.schema.names.index(KEY_HASH)
    statistics = [metadata.row_group(group).column(position).statistics for group in range(metadata.num_row_groups)]
    return PublishedFile(
        path=path.name,
        rows=metadata.num_rows,
        bytes=path.stat().st_size,
        checksum=file_checksum(path),
        min_key_hash=min(group.min for group in statistics),
        max_key_hash=max(group.max for group in statistics),
    )


def _make_durable(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _is_published(root: ExportRoot, manifest: Manifest) -> bool:
    with suppress(NotPublished, ManifestInvalid):
        return root.entry(manifest.view.name, manifest.seq).id == manifest.id
    return False


def _take_away(manifest: Manifest, directory: Path, state: Path) -> None:
    """Take away what a run moved. What cannot be removed stays unseen; the error that led here is what counts."""
    for file in manifest.files:
        with suppress(OSError):
            (directory / file.path).unlink()
    with suppress(OSError):
        directory.rmdir()
    shutil.rmtree(state, ignore_errors=True)


def _unlisted_snapshots(root: ExportRoot, view: str) -> list[Path]:
    """Snapshots whose runs have not published them: not yet, or not any more."""
    return [path for path in (root.path / view / "snapshots").glob("*/") if not (path / MANIFEST).exists()]


def _last_change(directory: Path) -> float:
    """The time of the last change to anything in a directory, in seconds since the epoch; now, if it is vanishing."""
    try:
        return max(path.stat().st_mtime for path in (directory, *directory.rglob("*")))
    except FileNotFoundError:
        return time.time()
