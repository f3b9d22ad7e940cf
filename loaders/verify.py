"""Check an export root or a store, all of it, and say what is bad: checksums, order, counts, lineage.

A check goes on behind what it finds, so that one run names everything that has to be mended.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.catalog import SegmentRecord
from engine.environment import generations_path
from engine.errors import NotPublished, ShoalError
from engine.export_root import ExportRoot
from engine.feature_store import FeatureStore
from engine.manifest import Manifest
from engine.segment import Segment
from engine.version import BaseGeneration, ViewVersion
from loaders.published_rows import EntryReader


@dataclass(frozen=True)
class Checked:
    """One thing that was checked: `problem` says what is bad about it, None that nothing is."""

    what: str
    rows: int
    bytes: int
    problem: str | None = None


def verify(path: Path) -> Iterator[Checked]:
    """Check whatever is at a path, part by part.

    Raises:
        NotPublished: it is neither a store nor an export root.
    """
    if (path / "live" / "data.mdb").is_file():
        return verify_store(path)
    root = ExportRoot(path)
    if root.views():
        return verify_root(root)
    raise NotPublished(f"{path} is neither a store nor an export root with views")


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
            yield _checked(f"{what} ({manifest.kind})", lambda manifest=manifest: _check_entry(root, manifest))  # type: ignore[misc]
            if previous is not None and (previous.seq + 1 != manifest.seq or previous.id != manifest.parent):
                yield Checked(
                    what, 0, 0, f"it does not continue seq {previous.seq}: what lies between is missing or foreign"
                )
            previous = manifest


def _check_entry(root: ExportRoot, manifest: Manifest) -> tuple[int, int]:
    rows = sum(batch.num_rows for _, batch in EntryReader(root, manifest).batches())
    return rows, sum(file.bytes for file in manifest.files)


def verify_store(path: Path) -> Iterator[Checked]:
    """Check each segment of each view, and that what lies in the store is what its catalog names."""
    store = FeatureStore.open(path)
    version = store.version()
    for view, at_version in version.views.items():
        record = at_version.record
        named = (*record.overlays, record.base)
        for segment_record, segment in zip(named, at_version.segments, strict=True):
            yield _check_segment(f"{view} {segment_record.id}", segment_record, lambda segment=segment: segment)  # type: ignore[misc]
        for kept in record.kept:
            yield _check_segment(
                f"{view} {kept.id} (kept)",
                kept,
                lambda kept=kept: BaseGeneration(path, kept).segment,  # type: ignore[misc]
            )
        yield from _check_directories(path, view, at_version)


def _check_segment(what: str, record: SegmentRecord, read: Callable[[], Segment]) -> Checked:
    def check() -> tuple[int, int]:
        chunks = read().chunks
        for chunk in chunks:
            chunk.verify()
        rows = sum(chunk.header.rows for chunk in chunks)
        if rows != record.rows + record.tombstones:
            raise ShoalError(f"it has {rows} rows, the catalog says {record.rows} and {record.tombstones} tombstones")
        return rows, record.bytes

    return _checked(what, check)


def _check_directories(path: Path, view: str, version: ViewVersion) -> Iterator[Checked]:
    record = version.record
    named = {record.base.id, *(kept.id for kept in record.kept)}
    directory = generations_path(path, view)
    for entry in sorted(directory.iterdir()):
        if entry.name not in named and not entry.name.startswith("."):
            yield Checked(f"{view} {entry.name}", 0, 0, f"{entry} is not in the catalog; the next writer removes it")


def _checked(what: str, check: Callable[[], tuple[int, int]]) -> Checked:
    try:
        rows, size = check()
    except ShoalError as error:
        return Checked(what, 0, 0, str(error))
    return Checked(what, rows, size)
