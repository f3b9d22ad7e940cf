"""Decide a view's next step towards the end of its log: apply the next delta, load a snapshot, or fail.

This module only reads. The same root and record always lead to the same decision.
"""

from dataclasses import dataclass

from shoal.engine.base.errors import DeltaGap, ForeignDelta, NotPublished, ShoalError
from shoal.engine.format.catalog import ViewRecord
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.root.manifest import Manifest


@dataclass(frozen=True)
class LoadSnapshot:
    """The step to build a base from a snapshot. The base replaces all data of the view in the store."""

    manifest: Manifest
    reason: str


@dataclass(frozen=True)
class ApplyDelta:
    """The step to add a delta to the view as an overlay."""

    manifest: Manifest


Step = LoadSnapshot | ApplyDelta


def next_step(root: ExportRoot, view: str, record: ViewRecord | None) -> Step | None:
    """Return the next step for a view, or None if the store has all entries of its log.

    A store without the view starts from the newest snapshot. A store at seq k continues with entry k + 1. If that entry
    is gone, the store continues with the newest snapshot if the snapshot's seq is above k.

    Raises:
        NotPublished: the view has no snapshot to start from.
        DeltaGap: the next delta is missing, later ones exist, and no snapshot covers the gap.
        ForeignDelta: the root's entries do not continue the store's entries: the root was created again.
        ManifestInvalid: an entry breaks the contract.
    """
    if record is None:
        return LoadSnapshot(newest_snapshot(root, view), "the store does not have the view yet")
    following = record.applied_seq + 1
    if not root.has_entry(view, following):
        return _without_next(root, view, record)
    entry = root.entry(view, following)
    if entry.kind == "snapshot":
        return LoadSnapshot(entry, "a full snapshot was published")
    if entry.parent != record.applied_entry:
        raise ForeignDelta(
            f"view {view!r}: delta {entry.seq} continues entry {entry.parent}, but the store holds "
            f"{record.applied_entry}; publish a snapshot with `shoal export --full`"
        )
    return ApplyDelta(entry)


def fallback_snapshot(root: ExportRoot, view: str, seq: int, error: ShoalError) -> LoadSnapshot | None:
    """Return a step that loads the newest snapshot, or None if no snapshot is newer than entry `seq`.

    Entry `seq` cannot be applied because of `error`. A newer snapshot also contains the changes of that entry.
    """
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
            f"view {view!r}: the store is at seq {record.applied_seq}, but the log in {root} {ends}; this is a "
            f"different root, or it was created again: load into a new store directory, or restore the root"
        )
    if published[-1] == record.applied_seq:
        entry = root.entry(view, record.applied_seq)
        if entry.id != record.applied_entry:
            raise ForeignDelta(
                f"view {view!r}: seq {entry.seq} is {record.applied_entry} in the store and {entry.id} in {root}; the "
                f"root was created again: load into a new store directory"
            )
        return None
    if root.has_entry(view, record.applied_seq + 1):
        # The entry was published while the log was being listed.
        return next_step(root, view, record)
    snapshot = root.newest_snapshot(view)
    if snapshot is not None and snapshot.seq > record.applied_seq:
        return LoadSnapshot(snapshot, f"entry {record.applied_seq + 1} is gone from the log")
    later = min(seq for seq in published if seq > record.applied_seq)
    raise DeltaGap(
        f"view {view!r}: the store is at seq {record.applied_seq}, the log continues at {later}; entry "
        f"{record.applied_seq + 1} is missing: publish it again, or a snapshot with `shoal export --full`"
    )


def newest_snapshot(root: ExportRoot, view: str) -> Manifest:
    """Return the newest snapshot of a view. Raise NotPublished if it has no snapshot."""
    snapshot = root.newest_snapshot(view)
    if snapshot is None:
        raise NotPublished(
            f"{root} has no snapshot of view {view!r}; `shoal export --full --view {view}` publishes one"
        )
    return snapshot
