"""Decide how a view gets from where the store stands to where its log is: the next entry, a new base, or trouble.

Pure reading: nothing is written here, and the same root and record give the same answer.
"""

from dataclasses import dataclass

from engine.catalog import ViewRecord
from engine.errors import DeltaGap, ForeignDelta, NotPublished, ShoalError
from engine.export_root import ExportRoot
from engine.manifest import Manifest


@dataclass(frozen=True)
class LoadSnapshot:
    """Build a base from this snapshot; it replaces everything the store has of the view."""

    manifest: Manifest
    reason: str


@dataclass(frozen=True)
class ApplyDelta:
    """Lay this delta over what the store has."""

    manifest: Manifest


Step = LoadSnapshot | ApplyDelta


def next_step(root: ExportRoot, view: str, record: ViewRecord | None) -> Step | None:
    """What comes next for a view; None if the store has all there is.

    A store that has nothing of the view starts from the newest snapshot. One that stands at seq k goes on with entry
    k + 1; where that is gone, with the newest snapshot, if that is newer than k.

    Raises:
        NotPublished: the view has no snapshot to start from.
        DeltaGap: the next delta is missing, later ones exist, and no snapshot covers the gap.
        ForeignDelta: the root's entries do not continue what the store holds: the root was made anew.
        ManifestInvalid: an entry breaks the contract.
    """
    if record is None:
        return LoadSnapshot(newest_snapshot(root, view), "the store has nothing of the view yet")
    following = record.applied_seq + 1
    if not root.has_entry(view, following):
        return _without_next(root, view, record)
    entry = root.entry(view, following)
    if entry.kind == "snapshot":
        return LoadSnapshot(entry, "a full snapshot was published")
    if entry.parent != record.applied_entry:
        raise ForeignDelta(
            f"view {view!r}: delta {entry.seq} continues entry {entry.parent}, the store holds {record.applied_entry}; "
            f"publish a snapshot with `shoal export --full`"
        )
    return ApplyDelta(entry)


def way_around(root: ExportRoot, view: str, seq: int, error: ShoalError) -> LoadSnapshot | None:
    """The newest snapshot, if it is newer than the entry `seq` that cannot be applied: it holds what that one held."""
    try:
        snapshot = root.newest_snapshot(view)
    except ShoalError:
        return None
    if snapshot is None or snapshot.seq <= seq:
        return None
    return LoadSnapshot(snapshot, f"entry {seq} cannot be applied: {error}")


def _without_next(root: ExportRoot, view: str, record: ViewRecord) -> Step | None:
    if root.ended_lately(view, record.applied_seq):
        published = [record.applied_seq]
    else:
        published = root.sequence_numbers(view, since=record.applied_seq)
    if not published:
        earlier = root.sequence_numbers(view)
        ends = f"ends at {earlier[-1]}" if earlier else "is empty"
        raise ForeignDelta(
            f"view {view!r}: the store stands at seq {record.applied_seq}, but the log in {root} {ends}; it is another "
            f"root or was made anew: load into a new store directory, or bring the root back"
        )
    if published[-1] == record.applied_seq:
        entry = root.entry(view, record.applied_seq)
        if entry.id != record.applied_entry:
            raise ForeignDelta(
                f"view {view!r}: seq {entry.seq} is {record.applied_entry} in the store and {entry.id} in {root}; the "
                f"root was made anew: load into a new store directory"
            )
        return None
    if root.has_entry(view, record.applied_seq + 1):
        # It was published while the log was being listed.
        return next_step(root, view, record)
    snapshot = root.newest_snapshot(view)
    if snapshot is not None and snapshot.seq > record.applied_seq:
        return LoadSnapshot(snapshot, f"entry {record.applied_seq + 1} is gone from the log")
    later = min(seq for seq in published if seq > record.applied_seq)
    raise DeltaGap(
        f"view {view!r}: the store stands at seq {record.applied_seq}, the log goes on at {later}; entry "
        f"{record.applied_seq + 1} is missing: publish it again, or a snapshot with `shoal export --full`"
    )


def newest_snapshot(root: ExportRoot, view: str) -> Manifest:
    """The newest snapshot of a view; raises NotPublished if it has none."""
    snapshot = root.newest_snapshot(view)
    if snapshot is None:
        raise NotPublished(
            f"{root} has no snapshot of view {view!r}; `shoal export --full --view {view}` publishes one"
        )
    return snapshot
