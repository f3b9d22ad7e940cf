"""A backup, a restore or an accepted loss is killed at any step: its result is complete or absent. The next attempt
succeeds and leaves no other files behind."""

import gc
import shutil
import signal
from pathlib import Path

import pytest

from shoal import FeatureStore
from shoal.engine.base.errors import StoreDamaged
from shoal.engine.root.export_root import ExportRoot
from shoal.loaders.backup.accepted_loss import LOST, accept_loss
from shoal.loaders.backup.backup import back_up, read_manifest, restore
from shoal.loaders.backup.verify import verify_store
from shoal.loaders.commit.store_writer import StoreWriter
from tests import stores
from tests.failpoints.processes import running

VIEW = stores.schema("doc", key="int64", a="int64")
OF_BACKUPS = ("backup.aside", "backup.published")
OF_RESTORES = ("restore.aside", "restore.published")
OF_LOSSES = ("loss.moved", "loss.moved:2", "loss.moved:3")
POINTS = (*OF_BACKUPS, *OF_RESTORES, *OF_LOSSES)


@pytest.fixture
def root(tmp_path: Path) -> ExportRoot:
    root = ExportRoot(tmp_path / "root")
    stores.publish_snapshot(root, VIEW, [{"doc_id": number, "a": 1} for number in range(40)])
    return root


def killed(main: object, *arguments: Path, at: str, log: Path) -> None:
    with running(main, *arguments, die_at=at, log=log) as process:  # type: ignore[arg-type]
        process.join(30)
        assert process.exitcode == -signal.SIGKILL, log.read_text()


def seen(store: Path) -> list[int]:
    values: list[int] = FeatureStore.open(store).lookup(["doc:a"], {"doc_id": [1, 39]}).to_pydict()["doc:a"]
    return values


@pytest.mark.parametrize("point", OF_BACKUPS)
def test_a_backup_that_is_killed_at_a_step(store: Path, tmp_path: Path, point: str) -> None:
    killed(back_up, store, tmp_path / "backups" / "one", at=point, log=tmp_path / "log")
    target = tmp_path / "backups" / "one"
    assert target.exists() == (point == "backup.published")
    if not target.exists():
        back_up(store, target)
    assert [path.name for path in target.parent.iterdir()] == ["one"]
    restore(target, tmp_path / "restored")
    assert seen(tmp_path / "restored") == [1, 1]


@pytest.mark.parametrize("point", OF_RESTORES)
def test_a_restore_that_is_killed_at_a_step(store: Path, tmp_path: Path, point: str) -> None:
    back_up(store, tmp_path / "backup")
    target = tmp_path / "stores" / "one"
    killed(restore, tmp_path / "backup", target, at=point, log=tmp_path / "log")
    assert target.exists() == (point == "restore.published")
    if not target.exists():
        restore(tmp_path / "backup", target)
    assert [path.name for path in target.parent.iterdir()] == ["one"]
    assert FeatureStore.open(target).version().id == read_manifest(tmp_path / "backup").version
    assert seen(target) == [1, 1]
    assert [checked for checked in verify_store(target) if checked.problem] == []


@pytest.mark.parametrize("point", OF_LOSSES)
def test_an_accepted_loss_that_is_killed_at_a_step(store: Path, root: ExportRoot, tmp_path: Path, point: str) -> None:
    gc.collect()
    shutil.rmtree(store / "live" / "1")
    killed(accept_loss, store, at=point, log=tmp_path / "log")
    if point != "loss.moved:3":
        with pytest.raises(StoreDamaged):
            StoreWriter(store)
        accept_loss(store)
    # Nothing was deleted.
    assert {path.name for path in (store / LOST).glob("*/*")} == {"live", "generations", "begun"}
    stores.load(store, root)
    assert seen(store) == [1, 1]
