"""Check an export root or a store, all of it, and say what is bad: checksums, order, counts, lineage.

A check goes on behind what it finds, so that one run names everything that has to be mended.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from engine.begun import SLOT_OFFSETS, begun_path, decode_slot
from engine.catalog import SegmentRecord, ViewRecord
from engine.environment import generations_path, is_root, is_store, open_live
from engine.errors import NotPublished, PathsSwapped, ShoalError, StoreDamaged
from engine.export_root import ExportRoot
from engine.feature_store import FeatureStore
from engine.manifest import Manifest
from engine.reading import read_generation, read_version
from engine.segment import Segment
from engine.shards import Shard
from loaders.published_rows import EntryReader


@dataclass(frozen=True)
class Checked:
    """One thing that was checked: `problem` says what is bad about it, None that nothing is."""

    what: str
    rows: int
    bytes: int
    problem: str | None = None


def verify(address: str | os.PathLike[str]) -> Iterator[Checked]:
    """Check the store or the export root at an address, part by part.

    Raises:
        NotPublished: it is neither a store nor an export root, or nothing was published there.
        PathsSwapped: it is both.
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
    raise NotPublished(f"{root} is neither a store nor an export root in which something was published")


def verify_root(root: ExportRoot) -> Iterator[Checked]:
    """Check each entry of each view's log and each snapshot, every row of them, and the feature services."""
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
                    what, 0, 0, f"it does not continue seq {previous.seq}: what lies between is missing or foreign"
                )
            previous = manifest


def _check_entry(root: ExportRoot, manifest: Manifest) -> tuple[int, int]:
    rows = sum(batch.num_rows for _, batch in EntryReader(root, manifest).batches())
    return rows, sum(file.bytes for file in manifest.files)


def verify_store(path: Path) -> Iterator[Checked]:
    """Check the store's own files, each segment of each view, and that what lies in it is what its catalog names."""
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
    """Check the record of how far the store got; a store of an earlier release has none."""
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
        raise StoreDamaged(f"it has {rows} rows, the catalog says {record.rows} and {record.tombstones} tombstones")
    return rows, record.bytes


def _check_generation(path: Path, record: SegmentRecord, shard: Shard | None) -> tuple[int, int]:
    return _check_segment(read_generation(path, record), shard)


def _check_beside(path: Path, view: str, record: ViewRecord, shard: Shard | None) -> Iterator[Checked]:
    """Check what a view has besides the segments that are served: generations that are kept, or in the way."""
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
