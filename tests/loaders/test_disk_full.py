"""A full disk: the error says so, the last version stays readable, and work continues once there is free space."""

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from shoal import FeatureStore
from shoal.engine.base.errors import FileDamaged, ShoalError, StoreFull
from shoal.engine.format.paths import generations_path
from shoal.engine.format.progress import Begun, begun_path, read_begun
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.store.disk import store_full_named
from shoal.engine.store.environment import open_live
from shoal.loaders.apply.compaction import fold
from shoal.loaders.apply.definition import define_view, drop_view
from shoal.loaders.apply.entries import apply_delta
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.follow.load import AppliedEntry, catch_up
from shoal.loaders.push.push import push_rows
from tests import stores

VIEW = stores.schema("doc", key="int64", vector="float32[256]")
MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", path], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


@pytest.fixture
def root(tmp_path: Path) -> ExportRoot:
    root = ExportRoot(tmp_path / "root")
    stores.publish_snapshot(root, VIEW, rows(0, 500))
    return root


def rows(value: int, count: int) -> list[stores.Row]:
    return [{"doc_id": n, "vector": np.full(256, value, np.float32)} for n in range(count)]


def seen(store: Path) -> set[float]:
    found = FeatureStore.open(store).lookup(["doc:vector"], {"doc_id": list(range(500))})
    return {float(number) for number in np.unique(found["doc:vector"].values)}


def fill(disk: Path, leave: int) -> Path:
    """Write a file that leaves only `leave` bytes free, and return its path."""
    ballast = disk / "ballast"
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free - leave)
    return ballast


def test_a_snapshot_for_which_there_is_no_room_is_told_and_loaded_later(disk: Path, root: ExportRoot) -> None:
    store = disk / "store"
    stores.load(store, root)
    ballast = fill(disk, 300 << 10)
    stores.publish_snapshot(root, VIEW, rows(1, 500))
    for _ in range(2):
        with pytest.raises(StoreFull, match=r"the disk is full \(.* MiB free\); free some room and load again"):
            stores.load(store, root)
        assert seen(store) == {0.0}
    trouble = FeatureStore.open(store).version().troubles["doc"]
    assert trouble.code == "StoreFull"
    ballast.unlink()
    stores.load(store, root)
    assert seen(store) == {1.0}
    assert FeatureStore.open(store).version().troubles == {}


def test_a_delta_for_which_there_is_no_room_is_told_and_applied_later(disk: Path, root: ExportRoot) -> None:
    store = disk / "store"
    stores.load(store, root)
    ballast = fill(disk, 100 << 10)
    stores.publish_delta(root, VIEW, rows(1, 200))
    with pytest.raises(StoreFull):
        stores.load(store, root)
    assert seen(store) == {0.0}
    ballast.unlink()
    stores.load(store, root)
    assert seen(store) == {0.0, 1.0}


def test_a_merge_for_which_there_is_no_room_is_told_and_made_up_for(disk: Path, root: ExportRoot) -> None:
    store = disk / "store"
    stores.load(store, root)
    for seq in range(2, 4):
        stores.publish_delta(root, VIEW, rows(seq, 150))
    with StoreWriter(store) as writer:
        apply_delta(writer, root, root.entry("doc", 2))
        apply_delta(writer, root, root.entry("doc", 3))
    ballast = fill(disk, 20 << 10)
    for _ in range(2):
        with pytest.raises(StoreFull):
            stores.load(store, root)
        view = FeatureStore.open(store).version().view("doc")
        assert (view.record.applied_seq, len(view.record.overlays)) == (3, 2)
        assert seen(store) == {0.0, 3.0}
    ballast.unlink()
    assert stores.load(store, root) == []
    version = FeatureStore.open(store).version()
    assert (len(version.view("doc").record.overlays), version.troubles) == (1, {})
    assert seen(store) == {0.0, 3.0}


def test_a_delta_is_told_as_applied_though_there_is_no_room_to_merge_it(disk: Path, root: ExportRoot) -> None:
    store = disk / "store"
    stores.publish_delta(root, VIEW, rows(1, 150))
    stores.load(store, root)
    told: list[int] = []

    class Told(stores.NullObserver):
        def finished(self, applied: AppliedEntry) -> None:
            told.append(applied.seq)

    manifest = stores.publish_delta(root, VIEW, rows(2, 150))
    with StoreWriter(store) as writer:
        # There is room for the delta, about 160 KiB, but not for its merge with the previous delta.
        fill(disk, 200 << 10)
        with pytest.raises(StoreFull):
            catch_up(writer, root, "doc", Told())
    assert told == [manifest.seq]
    assert seen(store) == {0.0, 2.0}


def test_views_that_no_root_publishes_are_defined_and_removed_once_there_is_room(disk: Path, root: ExportRoot) -> None:
    store = disk / "store"
    stores.load(store, root)
    ballast = fill(disk, 0)
    with StoreWriter(store) as writer:
        with pytest.raises(StoreFull):
            define_view(writer, stores.schema("other", key="int64", clicks="int64"))
        assert set(writer.version().views) == {"doc"}
        ballast.unlink()
        define_view(writer, stores.schema("other", key="int64", clicks="int64"))
        drop_view(writer, "doc")
    assert set(FeatureStore.open(store).version().views) == {"other"}


def test_a_push_for_which_there_is_no_room_is_not_acknowledged_and_taken_later(disk: Path, root: ExportRoot) -> None:
    store = disk / "store"
    stores.load(store, root)
    columns = {"doc_id": list(range(200)), "vector": [[1.0] * 256] * 200}
    with StoreWriter(store) as writer:
        ballast = fill(disk, 100 << 10)
        for _ in range(2):
            with pytest.raises(StoreFull):
                push_rows(writer, "doc", columns, request_id="one")
            assert seen(store) == {0.0}
        ballast.unlink()
        assert push_rows(writer, "doc", columns, request_id="one").applied.rows == 200
        assert seen(store) == {0.0, 1.0}


def test_a_fold_for_which_there_is_no_room_leaves_nothing(disk: Path, root: ExportRoot) -> None:
    store = disk / "store"
    stores.publish_delta(root, VIEW, rows(1, 300))
    stores.load(store, root)
    ballast = fill(disk, 300 << 10)
    with StoreWriter(store) as writer:
        before = {path.name for path in generations_path(store, "doc").iterdir()}
        with pytest.raises(StoreFull):
            fold(writer, "doc")
        assert {path.name for path in generations_path(store, "doc").iterdir()} == before
        assert seen(store) == {0.0, 1.0}
        ballast.unlink()
        assert fold(writer, "doc")
    assert seen(store) == {0.0, 1.0}


@pytest.mark.parametrize("leave", [0, 4096, 16 << 10, 64 << 10, 256 << 10, 700 << 10])
def test_a_store_cannot_be_begun_without_room_but_later(disk: Path, root: ExportRoot, leave: int) -> None:
    ballast = fill(disk, leave)
    with pytest.raises(StoreFull):
        stores.load(disk / "store", root)
    ballast.unlink()
    stores.load(disk / "store", root)
    assert seen(disk / "store") == {0.0}


@pytest.mark.parametrize("leave", [0, 4096, 8192, 16 << 10, 64 << 10])
def test_a_store_on_a_full_disk_is_read_and_its_writer_starts(disk: Path, root: ExportRoot, leave: int) -> None:
    store = disk / "store"
    stores.load(store, root)
    ballast = fill(disk, leave)
    stores.publish_delta(root, VIEW, rows(1, 200))
    other = stores.schema("other", key="int64", vector="float32[256]")
    stores.publish_snapshot(root, other, [{"other_id": 1}])
    with pytest.raises(ShoalError, match="the disk is full"):
        stores.load(store, root)
    assert seen(store) == {0.0}
    ballast.unlink()
    stores.load(store, root)
    assert seen(store) == {0.0, 1.0}


def test_a_record_of_how_far_the_store_got_needs_no_room_and_fails_no_push_for_want_of_it(
    disk: Path, root: ExportRoot, caplog: pytest.LogCaptureFixture
) -> None:
    store = disk / "store"
    stores.load(store, root)
    with StoreWriter(store) as writer:

        def push(value: float) -> int:
            return push_rows(writer, "doc", {"doc_id": [1], "vector": [[value] * 256]}).version

        # These pushes leave free pages for later pushes.
        for value in range(20):
            push(value)
        ballast = fill(disk, 0)
        version = push(20.0)
        assert read_begun(store) == Begun(writer_id(store), 1, version)
        # The writer still has the file open, so its blocks are not freed.
        begun_path(store).unlink()
        version = push(21.0)
        writer.sync()
        assert not begun_path(store).exists()
        assert [line for line in caplog.messages if "begun cannot be written" in line]
        ballast.unlink()
        writer.sync()
        assert read_begun(store) == Begun(writer_id(store), 1, version)


def writer_id(store: Path) -> bytes:
    progress = open_live(store, writable=True).progress()
    assert progress is not None
    return progress.store_id


def test_the_first_error_is_told_though_there_is_no_room_to_note_it(
    disk: Path, root: ExportRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = disk / "store"
    stores.load(store, root)
    manifest = stores.publish_delta(root, VIEW, rows(1, 10))
    (root.directory(manifest) / manifest.files[0].path).unlink()

    def no_room(self: StoreWriter, view: str, error: ShoalError) -> None:
        raise StoreFull("no room for a note")

    monkeypatch.setattr(StoreWriter, "note_trouble", no_room)
    with pytest.raises(FileDamaged, match="is missing"):
        stores.load(store, root)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_quota_is_a_full_disk_too(tmp_path: Path, number: int) -> None:
    with pytest.raises(StoreFull, match="the disk is full"), store_full_named(tmp_path / "not" / "there"):
        raise OSError(number, os.strerror(number))


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), store_full_named(tmp_path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
