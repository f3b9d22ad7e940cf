"""Other users have no access to a store or to the writer's control socket, whatever the umask."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.engine.base.errors import RunDirectoryPrivate
from shoal.engine.process.run_directory import make_run_directory
from shoal.engine.root.export_root import ExportRoot
from shoal.loaders.apply.compaction import fold
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.follow.load import load
from shoal.loaders.writer import LogObserver
from tests import stores
from tests.every_type import USERS, user_rows
from tests.server.serving import Server

NOBODY = 65534


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_a_store_that_is_served_is_private(root: ExportRoot, tmp_path: Path, umask: int) -> None:
    store = tmp_path / "store"
    with Server(store, {"root": str(root)}, umask=umask, workers=1) as server:
        server.await_views("items", "users", "pairs", "recent")
        assert mode(store / "run") == 0o700
        assert mode(store / "run" / "writer.sock") == 0o600
        made = {path: mode(path) for path in (store, *store.rglob("*")) if store / "run" not in path.parents}
    assert {path.name for path in made} >= {"store", "live", "lock.mdb", "data.mdb", "generations", "users"}
    # Others have no access, and the group cannot write, except to LMDB's table of readers.
    assert [path for path, its in made.items() if its & 0o007] == []
    assert {path.name for path, its in made.items() if its & 0o020} <= {"lock.mdb"}
    assert {its & 0o700 for path, its in made.items() if path.is_file()} == {0o600}


def test_what_a_writer_makes_later_is_private_too(tmp_path: Path) -> None:
    root = ExportRoot(tmp_path / "root")
    before = os.umask(0)
    try:
        with StoreWriter(tmp_path / "store") as writer:
            stores.publish_snapshot(root, USERS, user_rows(10))
            load(writer, root, LogObserver())
            stores.publish_delta(root, USERS, user_rows(12)[10:])
            load(writer, root, LogObserver())
            assert fold(writer, "users")
    finally:
        os.umask(before)
    store = tmp_path / "store"
    generations = [*(store / "generations" / "users").iterdir()]
    assert len(generations) == 2
    assert [
        path for path in (store, *store.rglob("*")) if mode(path) & 0o007 and store / "run" not in path.parents
    ] == []


def test_a_run_directory_of_before_becomes_private(tmp_path: Path) -> None:
    (tmp_path / "store" / "run").mkdir(parents=True)
    (tmp_path / "store").chmod(0o755)
    (tmp_path / "store" / "run").chmod(0o777)
    make_run_directory(tmp_path / "store")
    assert mode(tmp_path / "store" / "run") == 0o700
    # The directory existed before, so its mode may be intended.
    assert mode(tmp_path / "store") == 0o755


# --- another user --------------------------------------------------------------------------------------------------


@pytest.fixture
def open_store() -> Iterator[Path]:
    """A directory for a store that every user may enter, unlike pytest's directories."""
    if os.geteuid() != 0:
        pytest.skip("only root can be another user for a while")
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    (path / "store").mkdir(mode=0o755)
    yield path / "store"
    shutil.rmtree(path)


AS_NOBODY = """
import os, sys
from pathlib import Path
from shoal.engine.process.control import WriterClient
from shoal.engine.base.errors import ShoalError
from shoal.engine.status.processes import describe_server
from shoal.loaders.commit.store_writer import StoreWriter
import asyncio

os.setgroups([]), os.setgid({nobody}), os.setuid({nobody})
store = Path(sys.argv[1])
for act in (describe_server, StoreWriter, lambda store: asyncio.run(WriterClient(store).reload())):
    try:
        print(act(store))
    except ShoalError as error:
        print(type(error).__name__, error)
"""


def test_another_user_is_told_whose_it_is(open_store: Path, root: ExportRoot) -> None:
    with Server(open_store, {"root": str(root)}, workers=1) as server:
        server.await_ready()
        script = AS_NOBODY.format(nobody=NOBODY)
        done = subprocess.run([sys.executable, "-c", script, str(open_store)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    whose = f"is private to user 0, but this process runs as user {NOBODY}; run it as user 0"
    private = f"RunDirectoryPrivate {open_store}/run {whose}"
    status, writing, order = done.stdout.splitlines()
    assert (status, writing) == (private, private)
    assert order.startswith(f"WriterUnavailable no writer answers on {open_store}/run/writer.sock")
    assert "Permission denied" in order


def test_a_run_directory_that_cannot_be_made_private_is_refused(open_store: Path) -> None:
    run = make_run_directory(open_store)
    os.chown(run, NOBODY, NOBODY)
    run.chmod(0o777)
    os.seteuid(NOBODY - 1)
    try:
        whose = f"is private to user {NOBODY}, but this process runs as user {NOBODY - 1}"
        with pytest.raises(RunDirectoryPrivate, match=whose):
            make_run_directory(open_store)
    finally:
        os.seteuid(0)
