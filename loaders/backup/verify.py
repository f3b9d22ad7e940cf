"""Check a whole export root or store, and report each fault: checksums, order, counts, lineage.

A check continues after a fault, so one run reports everything that must be repaired.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from shoal.engine.base.errors import NotPublished, PathsSwapped, ShoalError, StoreDamaged
from shoal.engine.base.shards import Shard
from shoal.engine.feature_store import FeatureStore
from shoal.engine.format.catalog import SegmentRecord, ViewRecord
from shoal.engine.format.paths import generations_path, is_root, is_store
from shoal.engine.format.progress import SLOT_OFFSETS, begun_path, decode_slot
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.root.manifest import Manifest
from shoal.engine.store.environment import open_live
from shoal.engine.store.open_version import read_generation, read_version
from shoal.engine.store.segment import Segment
from shoal.loaders.segments.published_rows import EntryReader


@dataclass(frozen=True)
class Checked:
    """The result of one check. `problem` describes the fault; None means that there is no fault."""

    what: str
    rows: int
    bytes: int
    problem: str | None = None


def verify(address: str | os.PathLike[str]) -> Iterator[Checked]:
    """Check the store or the export root at an address, part by part.

    Raises:
        NotPublished: the address is neither a store nor an export root, or nothing was published there.
        PathsSwapped: the address is both.
    """
    path = Path(address)
    if is_store(path):
        if is_root(path):
            raise PathsSwapped(
                f"{path} holds an export root, and the files of a store: stop the server that runs on it, and move "
                f"away the directories `live`, `generations` and `run` and the file `begun`"
            )
        return verify_store(path)
    root = ExportRoot(address)
    if any(root.sequence_numbers(view) for view in root.views()):
        return verify_root(root)
    raise NotPublished(f"{root} is neither a store nor an export root with published entries")


def verify_root(root: ExportRoot) -> Iterator[Checked]:
    """Check the feature services, and every entry of each view's log with all of its rows."""
    yield _checked("services.json", lambda: (len(root.services()), 0))
    for view in root.views():
        previous: Manifest | None = None
        for seq in root.sequence_numbers(view):
            what = f"{view} seq {seq}"
            try:
                manifest = root.entry(view, seq)
            except ShoalError as error:
                yield Checked(what, 0, 0, str(error))
                previous = None
                continue
            yield _checked(f"{what} ({manifest.kind})", partial(_check_entry, root, manifest))
            if previous is not None and (previous.seq + 1 != manifest.seq or previous.id != manifest.parent):
                yield Checked(
                    what, 0, 0, f"it does not continue seq {previous.seq}: an entry is missing, or from another root"
                )
            previous = manifest


def _check_entry(root: ExportRoot, manifest: Manifest) -> tuple[int, int]:
    rows = sum(batch.num_rows for _, batch in EntryReader(root, manifest).batches())
    return rows, sum(file.bytes for file in manifest.files)


def verify_store(path: Path) -> Iterator[Checked]:
    """Check the store's own files and each segment of each view. Report generations that the catalog does not name."""
    yield _checked("begun", partial(_check_begun, path))
    live = _checked("live", partial(_check_live, path))
    yield live
    if live.problem is not None:
        return
    version = FeatureStore.open(path).version()
    for view, damage in version.damaged.items():
        yield Checked(view, 0, 0, damage.message)
        if damage.record is not None:
            yield from _check_beside(path, view, damage.record, version.shard)
    for view, at_version in version.views.items():
        for segment in at_version.segments:
            yield _checked(f"{view} {segment.record.id}", partial(_check_segment, segment, version.shard))
        yield from _check_beside(path, view, at_version.record, version.shard)


def _check_begun(path: Path) -> tuple[int, int]:
    """Check the record of the store's progress. A store of an earlier release has no such record."""
    file = begun_path(path)
    if not file.exists():
        return 0, 0
    content = file.read_bytes()
    if any(decode_slot(content, offset) is None for offset in SLOT_OFFSETS):
        raise StoreDamaged(f"{file}: one of its two slots is damaged; the next commits rewrite it")
    return 0, len(content)


def _check_live(path: Path) -> tuple[int, int]:
    live = open_live(path)
    live.check_pages()
    read_version(path, live, None)
    return 0, live.env.info()["last_pgno"] * live.env.stat()["psize"]


def _check_segment(segment: Segment, shard: Shard | None) -> tuple[int, int]:
    record = segment.record
    for chunk in segment.chunks:
        chunk.verify()
        if shard is not None and not shard.holds_all(chunk.header.min_hash, chunk.header.max_hash):
            raise StoreDamaged(f"{chunk.origin} has rows that do not belong to shard {shard}, which the store holds")
    rows = sum(chunk.header.rows for chunk in segment.chunks)
    if rows != record.rows + record.tombstones:
        raise StoreDamaged(f"it has {rows} rows; the catalog says {record.rows} rows, {record.tombstones} tombstones")
    return rows, record.bytes


def _check_generation(path: Path, record: SegmentRecord, shard: Shard | None) -> tuple[int, int]:
    return _check_segment(read_generation(path, record), shard)


def _check_beside(path: Path, view: str, record: ViewRecord, shard: Shard | None) -> Iterator[Checked]:
    """Check a view's generations that are not served: kept generations, and those that the catalog does not name."""
    for kept in record.kept:
        yield _checked(f"{view} {kept.id} (kept)", partial(_check_generation, path, kept, shard))
    named = {record.base.id, *(kept.id for kept in record.kept)}
    directory = generations_path(path, view)
    for entry in sorted(directory.iterdir()) if directory.is_dir() else ():
        if entry.name not in named and not entry.name.startswith("."):
            yield Checked(f"{view} {entry.name}", 0, 0, f"{entry} is not in the catalog; the next writer removes it")


def _checked(what: str, check: Callable[[], tuple[int, int]]) -> Checked:
    try:
        rows, size = check()
    except ShoalError as error:
        return Checked(what, 0, 0, str(error))
    return Checked(what, rows, size)
