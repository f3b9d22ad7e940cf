"""Backups: each holds one version even if the store is written to, is checked, and is complete or absent."""

import gc
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal import FeatureStore
from shoal.engine.base.errors import (
    BackupInvalid,
    NothingLost,
    PathTaken,
    StoreDamaged,
    StoreLocked,
    StoreNotFound,
)
from shoal.engine.format.paths import DATA, generations_path, live_path
from shoal.engine.format.progress import begun_path, read_begun
from shoal.engine.root.export_root import ExportRoot
from shoal.loaders.apply.compaction import fold
from shoal.loaders.backup.accepted_loss import LOST, accept_loss
from shoal.loaders.backup.backup import MANIFEST, back_up, restore
from shoal.loaders.backup.verify import verify_store
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.push.push import push_rows
from tests import stores
from tests.cli.test_commands import shoal

VIEW = stores.schema("doc", key="int64", a="int64")
OTHER = stores.schema("other", key="int64", a="int64")


@pytest.fixture
def root(tmp_path: Path) -> ExportRoot:
    root = ExportRoot(tmp_path / "root")
    stores.publish_snapshot(root, VIEW, [{"doc_id": n, "a": 1} for n in range(200)])
    stores.publish_snapshot(root, OTHER, [{"other_id": n, "a": 1} for n in range(40)])
    return root


def seen(store: Path) -> list[int]:
    values: list[int] = FeatureStore.open(store).lookup(["doc:a"], {"doc_id": [1, 2]}).to_pydict()["doc:a"]
    return values


def test_the_live_of_a_backup_is_no_live_of_a_store_that_went_on(store: Path, tmp_path: Path) -> None:
    for value in (1, 2, 3):
        with StoreWriter(store) as writer:
            push_rows(writer, "doc", {"doc_id": [1], "a": [value]})
        gc.collect()
        backup = tmp_path / f"backup-{value}"
        back_up(store, backup)
        with StoreWriter(store) as writer:
            push_rows(writer, "doc", {"doc_id": [1], "a": [10 * value]})
        gc.collect()
        shutil.move(store / "live", tmp_path / f"live-{value}")
        shutil.copytree(backup / "live", store / "live")
        with pytest.raises(StoreDamaged):
            StoreWriter(store)
        gc.collect()
        shutil.rmtree(store / "live")
        shutil.move(tmp_path / f"live-{value}", store / "live")
    assert seen(store)[0] == 30


def test_a_backup_holds_one_version_though_the_store_is_written_to(store: Path, tmp_path: Path) -> None:
    """Pushes of two rows each run during the backups, and folds remove bases that a backup may be about to copy."""
    stop = threading.Event()
    written = [1]
    with StoreWriter(store, kept_generations=0) as writer:

        def write() -> None:
            while not stop.is_set():
                value = written[-1] + 1
                push_rows(writer, "doc", {"doc_id": [1, 2], "a": [value, value]}, request_id=f"push {value}")
                written.append(value)
                if value % 3 == 0:
                    fold(writer, "doc")

        thread = threading.Thread(target=write)
        push_rows(writer, "doc", {"doc_id": [1, 2], "a": [1, 1]}, request_id="push 1")
        thread.start()
        try:
            least = []
            for number in range(4):
                least.append(written[-1])
                back_up(store, tmp_path / f"backup-{number}")
        finally:
            stop.set()
            thread.join()
        version = writer.version().id
    for number, at_least in enumerate(least):
        restored = tmp_path / f"restored-{number}"
        manifest = restore(tmp_path / f"backup-{number}", restored)
        (value,) = set(seen(restored))
        assert at_least <= value <= written[-1]
        assert [checked for checked in verify_store(restored) if checked.problem] == []
        begun = read_begun(restored)
        assert begun is not None
        assert begun.commit == manifest.version <= version + 2
        gc.collect()
        # The restored store continues: versions rise, and earlier pushes are recognized.
        with StoreWriter(restored) as again:
            assert (
                push_rows(again, "doc", {"doc_id": [1, 2], "a": [value] * 2}, request_id=f"push {value}").applied.rows
                == 2
            )
            assert push_rows(again, "doc", {"doc_id": [1, 2], "a": [7, 7]}).version > manifest.version
        assert seen(restored) == [7, 7]
    # Neither this push nor later writes to the original store changed the backups.
    restore(tmp_path / "backup-0", tmp_path / "again")
    assert seen(tmp_path / "again") != [7, 7]


def test_bases_are_linked_and_what_is_written_later_is_not(store: Path, tmp_path: Path) -> None:
    back_up(store, tmp_path / "backup")
    restore(tmp_path / "backup", tmp_path / "restored")
    for path in store.rglob("*"):
        twin = tmp_path / "restored" / path.relative_to(store)
        if twin.is_file() and path.is_file():
            assert path.samefile(twin) == (path.name == DATA and "generations" in path.parts)


def bend(path: Path, change: Callable[[bytes], bytes]) -> None:
    content = change(path.read_bytes())
    path.unlink()  # Other links to the file keep the old content.
    path.write_bytes(content)


def turned(content: bytes) -> bytes:
    return content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]


BENT: dict[str, Callable[[Path], object]] = {
    "live": lambda backup: bend(live_path(backup) / DATA, turned),
    "a base": lambda backup: bend(next(generations_path(backup, "doc").glob("*/data.mdb")), turned),
    "a base cut": lambda backup: bend(next(generations_path(backup, "doc").glob("*/data.mdb")), lambda all: all[:4096]),
    "the record": lambda backup: bend(begun_path(backup), lambda content: b"x" + content[1:]),
    "the manifest": lambda backup: bend(backup / MANIFEST, lambda content: content.replace(b'"doc"', b'"dod"')),
    "a path in the manifest": lambda backup: bend(
        backup / MANIFEST, lambda content: content.replace(b'"begun"', b'"../begun"')
    ),
    "a manifest that is none": lambda backup: bend(backup / MANIFEST, lambda content: b"[]"),
}


@pytest.mark.parametrize("how", BENT)
def test_a_backup_that_has_changed_is_not_restored(store: Path, tmp_path: Path, how: str) -> None:
    back_up(store, tmp_path / "backup")
    BENT[how](tmp_path / "backup")
    with pytest.raises(BackupInvalid):
        restore(tmp_path / "backup", tmp_path / "restored")
    assert not (tmp_path / "restored").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_backup_that_lacks_a_file_is_not_restored(store: Path, tmp_path: Path) -> None:
    back_up(store, tmp_path / "backup")
    next(generations_path(tmp_path / "backup", "doc").glob("*/data.mdb")).unlink()
    with pytest.raises(BackupInvalid, match="is missing"):
        restore(tmp_path / "backup", tmp_path / "restored")


def test_a_store_that_is_damaged_is_not_backed_up(store: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreNotFound):
        back_up(tmp_path / "nothing", tmp_path / "backup")
    base = next(generations_path(store, "doc").glob("*/data.mdb"))
    content = base.read_bytes()
    at = content.index(b"SHOALSEG") + 1000
    base.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
    with pytest.raises(StoreDamaged, match=r"cannot be backed up: doc .*has the checksum"):
        back_up(store, tmp_path / "backup")
    assert not (tmp_path / "backup").exists()
    assert not list(tmp_path.glob(".*"))


def test_nothing_is_written_over(store: Path, tmp_path: Path) -> None:
    back_up(store, tmp_path / "backup")
    for target in (tmp_path / "backup", store):
        with pytest.raises(PathTaken):
            back_up(store, target)
        with pytest.raises(PathTaken):
            restore(tmp_path / "backup", target)
    (tmp_path / "empty").mkdir()
    restore(tmp_path / "backup", tmp_path / "empty")
    assert seen(tmp_path / "empty") == [1, 1]


# --- losses that the operator accepts -----------------------------------------------------------------------------


def test_a_loss_is_accepted_only_where_there_is_one(store: Path, tmp_path: Path) -> None:
    with pytest.raises(NothingLost, match="has everything that it recorded"):
        accept_loss(store)
    with pytest.raises(StoreNotFound):
        accept_loss(tmp_path / "nothing")
    (store / "live" / "2").mkdir()
    gc.collect()
    with pytest.raises(NothingLost, match=r"live/1 is complete, but .*live/2 hides it"):
        accept_loss(store)
    (store / "live" / "2").rmdir()
    (store / "live").rename(store / "aside")
    with StoreWriter(tmp_path / "other"), pytest.raises(StoreLocked):
        accept_loss(tmp_path / "other")
    loss = accept_loss(store)
    assert loss.recorded is not None
    assert "data.mdb is missing" in loss.found
    assert {path.name for path in loss.moved_to.iterdir()} == {"generations", "begun"}
    assert loss.moved_to.parent == store / LOST


def test_the_commands(store: Path, root: ExportRoot, tmp_path: Path) -> None:
    backup = tmp_path / "backup"
    restored = tmp_path / "restored"
    made = shoal("backup", "--store", store, "--to", backup, "--json")
    assert json.loads(made.stdout)["views"] == ["doc", "other"]
    assert "has everything that it recorded" in shoal("store", "accept-loss", "--store", store, code=2).stderr
    os.truncate(live_path(store) / DATA, 0)
    assert "BAD  live: " in shoal("verify", store, code=1).stdout
    accepted = shoal("store", "accept-loss", "--store", store).stdout
    assert "recorded: store " in accepted
    assert "data.mdb is empty" in accepted
    stores.load(store, root)
    assert seen(store) == [1, 1]
    assert "is at version" in shoal("restore", "--from", backup, "--to", restored).stdout
    assert seen(restored) == [1, 1]
