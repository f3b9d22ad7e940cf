"""In an export root, one exporter publishes each entry, whole and once. Readers refuse everything that was altered."""

import os
import threading
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import pytest

from shoal.engine.base.errors import FileDamaged, ManifestInvalid, NotPublished, PublicationLost
from shoal.engine.format.schema import FeatureService
from shoal.engine.root.export_root import MANIFEST, SERVICES, ExportRoot, file_checksum
from shoal.engine.root.manifest import FeatureServices, Manifest, seal, unseal
from tests import stores

VIEW = stores.schema("doc", a="int32")
ROWS: list[stores.Row] = [{"doc_id": str(number), "a": number} for number in range(30)]


@pytest.fixture
def root(tmp_path: Path) -> ExportRoot:
    return ExportRoot(tmp_path / "root")


def draft(seq: int, **changes: Any) -> Manifest:
    content: dict[str, Any] = {
        "kind": "delta",
        "id": uuid.uuid4().hex,
        "seq": seq,
        "parent": None,
        "view": VIEW,
        "rows": 0,
        "tombstones": 0,
        "files": (),
        "watermark": None,
        "published_at": datetime.now(UTC),
        "job": f"job {seq}",
        "inputs": (),
    }
    return Manifest.model_validate(content | changes)


def test_an_entry_is_read_as_it_was_published(root: ExportRoot) -> None:
    snapshot = stores.publish_snapshot(root, VIEW, ROWS)
    delta = stores.publish_delta(root, VIEW, ROWS[:3], ROWS[5:6])
    assert root.views() == ["doc"]
    assert root.sequence_numbers("doc") == [1, 2]
    assert (root.entry("doc", 1), root.entry("doc", 2)) == (snapshot, delta)
    assert root.snapshot("doc", snapshot.snapshot_id) == root.newest_snapshot("doc") == snapshot
    assert root.snapshot_ids("doc") == [snapshot.snapshot_id]
    assert (delta.parent, delta.rows, delta.tombstones) == (snapshot.id, 3, 1)
    for manifest in (snapshot, delta):
        for file in manifest.files:
            root.checked_file(manifest, file).close()


def test_what_has_no_manifest_does_not_exist(root: ExportRoot) -> None:
    stores.publish_snapshot(root, VIEW, ROWS)
    (root.path / "doc" / "deltas" / f"{2:012d}").mkdir()
    (root.path / "doc" / "snapshots" / "000000000002-abc").mkdir()
    (root.path / "doc" / "deltas" / "notes").mkdir()
    (root.path / "doc" / "deltas" / "notes" / MANIFEST).touch()
    assert root.sequence_numbers("doc") == [1]
    assert len(root.snapshot_ids("doc")) == 1
    assert not root.has_entry("doc", 2)
    with pytest.raises(NotPublished, match="is not published"):
        root.entry("doc", 2)
    with pytest.raises(NotPublished):
        root.snapshot("doc", "000000000002-abc")


def test_a_root_that_is_not_there_has_nothing(root: ExportRoot) -> None:
    assert not root.views()
    assert not root.sequence_numbers("doc")
    assert not root.snapshot_ids("doc")
    assert root.services() == ()
    assert root.newest_snapshot("doc") is None
    with pytest.raises(NotPublished, match="does not exist"):
        root.check_exists()


def test_of_many_exporters_of_one_seq_one_wins(root: ExportRoot) -> None:
    entries = [draft(1) for _ in range(8)]
    winners = list[str]()
    losses = list[str]()
    start = threading.Barrier(len(entries))

    def publish(manifest: Manifest) -> None:
        start.wait()
        try:
            root.publish(manifest)
            winners.append(manifest.id)
        except PublicationLost as error:
            losses.append(str(error))

    threads = [threading.Thread(target=publish, args=(manifest,)) for manifest in entries]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert winners == [root.entry("doc", 1).id]
    assert len(losses) == 7
    assert all("published meanwhile by job 1" in loss for loss in losses)
    assert [path.name for path in (root.path / "doc" / "deltas" / f"{1:012d}").iterdir()] == [MANIFEST]


def test_a_snapshot_that_lost_a_race_gets_no_manifest(root: ExportRoot) -> None:
    root.publish(draft(1))
    lost = draft(1, kind="snapshot")
    with pytest.raises(PublicationLost):
        root.publish(lost)
    assert root.snapshot_ids("doc") == []
    assert root.newest_snapshot("doc") is None


def test_a_snapshot_whose_exporter_died_half_way_is_in_the_log(root: ExportRoot) -> None:
    snapshot = stores.publish_snapshot(root, VIEW, ROWS)
    stores.publish_delta(root, VIEW, ROWS[:1])
    (root.directory(snapshot) / MANIFEST).unlink()
    assert root.snapshot_ids("doc") == []
    assert root.newest_snapshot("doc") == snapshot


def test_a_manifest_is_damaged_by_any_change_of_a_byte(root: ExportRoot) -> None:
    manifest = stores.publish_snapshot(root, VIEW, ROWS)
    path = root.path / "doc" / "deltas" / f"{1:012d}" / MANIFEST
    content = path.read_bytes()
    for position in range(0, len(content), 7):
        changed = bytearray(content)
        changed[position] ^= 0x01
        path.write_bytes(changed)
        try:
            # Whitespace between tokens has no meaning. A change of anything else is found.
            assert root.entry("doc", 1) == manifest
        except ManifestInvalid:
            continue
        assert orjson.loads(bytes(changed)) == orjson.loads(content)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b'"text"', b"\xff\xfe", b'{"checksum": "0"}'])
def test_what_is_no_manifest_is_invalid(root: ExportRoot, content: bytes) -> None:
    root.publish(draft(1))
    (root.path / "doc" / "deltas" / f"{1:012d}" / MANIFEST).write_bytes(content)
    with pytest.raises(ManifestInvalid):
        root.entry("doc", 1)


def test_a_manifest_that_cannot_be_read_is_invalid(root: ExportRoot) -> None:
    path = root.path / "doc" / "deltas" / f"{1:012d}" / MANIFEST
    path.mkdir(parents=True)
    with pytest.raises(ManifestInvalid, match="cannot be read"):
        root.entry("doc", 1)


def test_an_entry_in_a_place_not_its_own_is_invalid(root: ExportRoot) -> None:
    other = stores.schema("other", a="int32")
    sealed = {"seq": seal(draft(2)), "view": seal(draft(1, view=other))}
    path = root.path / "doc" / "deltas" / f"{1:012d}" / MANIFEST
    path.parent.mkdir(parents=True)
    path.write_bytes(sealed["seq"])
    with pytest.raises(ManifestInvalid, match="says seq 2, expected 1"):
        root.entry("doc", 1)
    path.write_bytes(sealed["view"])
    with pytest.raises(ManifestInvalid, match="belongs to view 'other', expected 'doc'"):
        root.entry("doc", 1)
    snapshot = root.path / "doc" / "snapshots" / "000000000001-00000000" / MANIFEST
    snapshot.parent.mkdir(parents=True)
    snapshot.write_bytes(seal(draft(1, kind="snapshot")))
    with pytest.raises(ManifestInvalid, match="contains the manifest of another entry"):
        root.snapshot("doc", "000000000001-00000000")


FILE = {"path": "part-0.parquet", "rows": 1, "bytes": 1, "checksum": "0" * 16, "min_key_hash": 0, "max_key_hash": 0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 1}, "its files hold 0 rows, but it claims 1 and 0 tombstones"),
        ({"rows": 2, "files": [FILE]}, "its files hold 1 rows"),
        ({"rows": -1, "tombstones": 1}, "rows"),
        ({"rows": 1, "files": [FILE | {"rows": 0}]}, "files.0.rows"),
        ({"rows": 1, "files": [FILE | {"path": "../part-0.parquet"}]}, "not a plain file name"),
        ({"rows": 1, "files": [FILE | {"path": "/etc/passwd"}]}, "not a plain file name"),
        ({"rows": 1, "files": [FILE | {"path": ".hidden"}]}, "not a plain file name"),
        ({"rows": 1, "files": [FILE | {"path": ""}]}, "not a plain file name"),
        ({"rows": 1, "files": [FILE | {"checksum": "x"}]}, "checksum"),
        ({"rows": 1, "files": [FILE | {"max_key_hash": 2**63}]}, "max_key_hash"),
        ({"rows": 2, "files": [FILE, FILE | {"path": "b"}]}, "overlap in key hash"),
        ({"rows": 2, "files": [FILE | {"min_key_hash": 5, "max_key_hash": 9}, FILE]}, "overlap in key hash"),
        ({"kind": "snapshot", "tombstones": 1, "files": [FILE]}, "a snapshot has no tombstones"),
        ({"kind": "push"}, "kind"),
        ({"seq": 0}, "seq"),
        ({"seq": 10**12}, "seq"),
        ({"id": "1"}, "id"),
        ({"parent": "1"}, "parent"),
        ({"format_version": 0}, "format_version"),
        ({"extra": 1}, "extra"),
    ],
)
def test_a_manifest_that_breaks_the_contract_is_invalid(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ManifestInvalid, match=message):
        unseal(stores.sealed(draft(1).model_dump(mode="json") | changes), Manifest, "it")


def test_sealing_is_undone_by_unsealing() -> None:
    services = FeatureServices(services=(FeatureService(name="a", features=("doc:a", "doc:*")),))
    assert unseal(seal(services), FeatureServices, "it") == services
    manifest = draft(3, watermark=datetime(2026, 1, 1, tzinfo=UTC), state="x", inputs=("é", '"'))
    assert unseal(seal(manifest), Manifest, "it") == manifest


def test_a_file_is_believed_only_if_it_is_the_one_published(root: ExportRoot) -> None:
    manifest = stores.publish_snapshot(root, VIEW, ROWS, files=1)
    file = manifest.files[0]
    path = root.directory(manifest) / manifest.files[0].path
    content = path.read_bytes()
    path.write_bytes(content + b"x")
    with pytest.raises(FileDamaged, match=f"has {len(content) + 1} bytes, its manifest says {len(content)}"):
        root.checked_file(manifest, file)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(FileDamaged, match="has the checksum"):
        root.checked_file(manifest, file)
    path.unlink()
    for read in (root.checked_file, root.open_file):
        with pytest.raises(FileDamaged, match="is missing; its manifest lists 30 rows"):
            read(manifest, file)
    path.symlink_to(path)
    for read in (root.checked_file, root.open_file):
        with pytest.raises(FileDamaged, match="cannot be read: Too many levels of symbolic links"):
            read(manifest, file)


def test_a_checksum_covers_files_larger_than_a_block(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(os.urandom(100) * 170_000)
    before = file_checksum(path)
    with path.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last[0] ^ 1]))
    assert file_checksum(path) != before


def test_feature_services_are_replaced_whole(root: ExportRoot) -> None:
    first = (FeatureService(name="a", features=("doc:a",)),)
    second = (FeatureService(name="b", features=("doc:*",)),)
    root.publish_services(first)
    assert root.services() == first
    root.publish_services(second)
    assert root.services() == second
    assert [path.name for path in root.path.iterdir()] == [SERVICES]
    (root.path / SERVICES).write_bytes(b"{}")
    with pytest.raises(ManifestInvalid):
        root.services()
    (root.path / SERVICES).unlink()
    (root.path / SERVICES).mkdir()
    with pytest.raises(ManifestInvalid, match="cannot be read"):
        root.services()
