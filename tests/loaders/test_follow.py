"""The next step for a view: each possible event in its log is told apart from all others."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoal.engine.base.errors import (
    DeltaGap,
    ForeignDelta,
    LineageError,
    ManifestInvalid,
    NotPublished,
)
from shoal.engine.format.catalog import ViewRecord
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.root.manifest import Manifest
from shoal.loaders.follow.plan import ApplyDelta, LoadSnapshot, fallback_snapshot, next_step
from tests import stores

VIEW = stores.schema("doc", a="int64")


@pytest.fixture
def root(tmp_path: Path) -> ExportRoot:
    return ExportRoot(tmp_path / "root")


def snapshot(root: ExportRoot) -> Manifest:
    return stores.publish_snapshot(root, VIEW, [])


def delta(root: ExportRoot) -> Manifest:
    return stores.publish_delta(root, VIEW, [])


def at(manifest: Manifest) -> ViewRecord:
    """Return a view's record that stands at an entry. Other fields are not needed."""
    content: dict[str, Any] = {"applied_seq": manifest.seq, "applied_entry": manifest.id}
    return ViewRecord.model_construct(**content)


def prune(root: ExportRoot, *manifests: Manifest) -> None:
    for manifest in manifests:
        shutil.rmtree(root.path / "doc" / "deltas" / f"{manifest.seq:012d}")
        if manifest.kind == "snapshot":
            shutil.rmtree(root.directory(manifest))


def seq_of(step: LoadSnapshot | ApplyDelta | None) -> tuple[type, int] | None:
    return (type(step), step.manifest.seq) if step else None


def test_a_new_node_starts_from_the_newest_snapshot(root: ExportRoot) -> None:
    snapshot(root), delta(root), snapshot(root), delta(root)
    assert seq_of(next_step(root, "doc", None)) == (LoadSnapshot, 3)


def test_a_new_node_needs_a_snapshot(root: ExportRoot) -> None:
    with pytest.raises(NotPublished, match="has no snapshot of view 'doc'"):
        next_step(root, "doc", None)
    delta(root)
    with pytest.raises(NotPublished, match="shoal export --full --view doc"):
        next_step(root, "doc", None)


def test_a_node_goes_on_with_the_next_entry_whatever_it_is(root: ExportRoot) -> None:
    first = snapshot(root)
    second = delta(root)
    third = snapshot(root)
    delta(root)
    assert seq_of(next_step(root, "doc", at(first))) == (ApplyDelta, 2)
    assert seq_of(next_step(root, "doc", at(second))) == (LoadSnapshot, 3)
    assert seq_of(next_step(root, "doc", at(third))) == (ApplyDelta, 4)


def test_a_node_that_has_everything_has_nothing_to_do(root: ExportRoot) -> None:
    for publish in (snapshot, delta, delta, snapshot):
        assert next_step(root, "doc", at(publish(root))) is None


def test_what_was_applied_is_not_applied_again_however_old_the_log_is(root: ExportRoot) -> None:
    first = snapshot(root)
    second = delta(root)
    third = delta(root)
    prune(root, first, second)
    assert next_step(root, "doc", at(third)) is None
    delta(root)
    assert seq_of(next_step(root, "doc", at(third))) == (ApplyDelta, 4)


def test_a_node_whose_next_delta_is_gone_starts_over(root: ExportRoot) -> None:
    first = snapshot(root)
    second = delta(root)
    _ = delta(root)
    _ = snapshot(root)
    _ = delta(root)
    prune(root, second)
    step = next_step(root, "doc", at(first))
    assert seq_of(step) == (LoadSnapshot, 4)
    assert isinstance(step, LoadSnapshot)
    assert step.reason == "entry 2 is gone from the log"


def test_a_gap_that_no_snapshot_covers_is_a_gap(root: ExportRoot) -> None:
    first = snapshot(root)
    second = delta(root)
    _ = delta(root)
    prune(root, second)
    with pytest.raises(DeltaGap, match=r"is at seq 1, the log continues at 3; entry\s+2 is missing"):
        next_step(root, "doc", at(first))


def test_a_delta_of_another_lineage_is_foreign(root: ExportRoot) -> None:
    first = snapshot(root)
    delta(root)
    stranger = first.model_copy(update={"id": "f" * 32})
    with pytest.raises(ForeignDelta, match=f"delta 2 continues entry {first.id}, but the store holds {'f' * 32}"):
        next_step(root, "doc", at(stranger))


def test_a_root_made_anew_is_foreign(root: ExportRoot, tmp_path: Path) -> None:
    old = [snapshot(root), delta(root), delta(root)]
    anew = ExportRoot(tmp_path / "anew")
    snapshot(anew)
    with pytest.raises(ForeignDelta, match=r"is at seq 3, but the log in .* ends at 1"):
        next_step(anew, "doc", at(old[2]))
    with pytest.raises(ForeignDelta, match=f"seq 1 is {old[0].id} in the store and .* the root was created again"):
        next_step(anew, "doc", at(old[0]))
    with pytest.raises(ForeignDelta, match="is empty"):
        next_step(ExportRoot(tmp_path / "empty"), "doc", at(old[0]))


def test_every_trouble_with_the_lineage_is_one() -> None:
    assert issubclass(DeltaGap, LineageError)
    assert issubclass(ForeignDelta, LineageError)


def test_an_entry_published_while_the_log_is_listed_is_no_gap(root: ExportRoot) -> None:
    first = snapshot(root)

    class LateRoot(ExportRoot):
        """A root where two entries appear just before the log is listed, and the listing shows only the later one."""

        looked = False

        def has_entry(self, view: str, seq: int) -> bool:
            found = super().has_entry(view, seq)
            if not self.looked:
                self.looked = True
                delta(root), delta(root)
            return found

        def sequence_numbers(self, view: str, *, since: int = 0) -> list[int]:
            return [seq for seq in super().sequence_numbers(view, since=since) if seq != 2]

    assert seq_of(next_step(LateRoot(root.path), "doc", at(first))) == (ApplyDelta, 2)


def test_a_way_around_an_entry_is_a_newer_snapshot(root: ExportRoot) -> None:
    snapshot(root), delta(root)
    error = ForeignDelta("it is foreign")
    assert fallback_snapshot(root, "doc", 2, error) is None
    newer = snapshot(root)
    step = fallback_snapshot(root, "doc", 2, error)
    assert step == LoadSnapshot(newer, "entry 2 cannot be applied: it is foreign")
    assert fallback_snapshot(root, "doc", 3, error) is None
    for path in (root.path / "doc").rglob("manifest.json"):
        path.write_bytes(b"damaged")
    assert fallback_snapshot(root, "doc", 2, error) is None


def damaged(root: ExportRoot, manifest: Manifest) -> None:
    (root.path / "doc" / "deltas" / f"{manifest.seq:012d}" / "manifest.json").write_bytes(b"{}")


def claims_other_seq(root: ExportRoot, manifest: Manifest) -> None:
    stores.falsify(root, manifest, seq=manifest.seq + 1)


@pytest.mark.parametrize("damage", [damaged, claims_other_seq])
def test_an_entry_that_breaks_the_contract_is_not_stepped_over(
    root: ExportRoot, damage: Callable[[ExportRoot, Manifest], None]
) -> None:
    first = snapshot(root)
    second = delta(root)
    _ = delta(root)
    damage(root, second)
    with pytest.raises(ManifestInvalid):
        next_step(root, "doc", at(first))
