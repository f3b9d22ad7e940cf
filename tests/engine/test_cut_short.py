"""A truncated file of the live environment gives one clear error. LMDB alone would let the process die of SIGBUS."""

import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path

import lmdb
import pytest

from shoal import FeatureStore
from shoal.engine.base.errors import StoreDamaged
from shoal.engine.format.paths import live_path
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.store.lmdb_file import check_length
from shoal.loaders.backup.accepted_loss import accept_loss
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.follow.load import catch_up
from tests import stores

VIEW = stores.schema("doc", key="int64", a="int64")


@pytest.fixture
def root(tmp_path: Path) -> ExportRoot:
    root = ExportRoot(tmp_path / "root")
    stores.publish_snapshot(root, VIEW, [{"doc_id": n, "a": 1} for n in range(40)])
    for value in range(2, 6):
        stores.publish_delta(root, VIEW, [{"doc_id": n, "a": value} for n in range(40 - value)], files=1)
    return root


@pytest.fixture
def store(tmp_path: Path, root: ExportRoot) -> Path:
    stores.load(tmp_path / "store", root)
    gc.collect()
    return tmp_path / "store"


def opened(store: Path) -> str:
    """Read a whole store in its own process, which may die. Return the number of keys, or the last error line."""
    program = "import sys; from shoal import FeatureStore\n"
    program += "print(FeatureStore.open(sys.argv[1]).lookup(['doc:a'], {'doc_id': list(range(40))}).keys)"
    done = subprocess.run([sys.executable, "-c", program, str(store)], capture_output=True, text=True)
    assert done.returncode >= 0, f"it died of signal {-done.returncode}"
    return done.stdout.strip() or done.stderr.splitlines()[-1]


def test_a_file_cut_short_anywhere_is_one_error_or_none_that_matters(store: Path, tmp_path: Path) -> None:
    size = (live_path(store) / "data.mdb").stat().st_size
    results = []
    for pages in range(1, size // 4096, 3):
        shutil.copytree(store, tmp_path / "copy")
        os.truncate(live_path(tmp_path / "copy") / "data.mdb", 4096 * pages)
        results.append(opened(tmp_path / "copy"))
        shutil.rmtree(tmp_path / "copy")
    cut = [result for result in results if result != "40"]
    assert len(cut) > len(results) // 2
    assert all(
        "shoal.engine.base.errors.StoreDamaged" in result and "`shoal store accept-loss`" in result for result in cut
    )


def test_the_writer_refuses_a_file_cut_short_and_starts_anew_once_the_loss_is_accepted(
    store: Path, root: ExportRoot
) -> None:
    data = live_path(store) / "data.mdb"
    for size in (4096 * 3, 8192, 4096, 100, 0):
        os.truncate(data, size)
        for open_store in (FeatureStore.open, StoreWriter):
            with pytest.raises(StoreDamaged, match="`shoal store accept-loss`"):
                open_store(store)
        # The data is left as it is, because it may be the only copy.
        assert data.stat().st_size == size
    accept_loss(store)
    stores.load(store, root)
    found = FeatureStore.open(store).lookup(["doc:a"], {"doc_id": [0, 39]})
    assert found.to_pydict() == {"doc:a": [5, 1]}


def test_pages_that_a_commit_gave_back_may_be_missing_at_the_end(tmp_path: Path) -> None:
    env = lmdb.open(str(tmp_path), max_dbs=2)
    db = env.open_db(b"values")
    with env.begin(write=True) as transaction:
        transaction.put(b"kept", b"x" * 9000, db=db)
    with env.begin(write=True) as transaction:
        transaction.put(b"gone", b"x" * 90_000, db=db)
    with env.begin(write=True) as transaction:
        transaction.delete(b"gone", db=db)
    for number in range(20):
        with env.begin(write=True) as transaction:
            transaction.put(b"small", b"%d" % number, db=db)
    env.close()
    data = tmp_path / "data.mdb"
    whole = data.stat().st_size
    needed = [pages for pages in range(2, whole // 4096) if _is_short(data, 4096 * pages)]
    assert needed
    assert max(needed) + 1 < whole // 4096, "the last pages of the value that is gone are not needed"
    os.truncate(data, 4096 * (max(needed) + 1))
    env = lmdb.open(str(tmp_path), max_dbs=2, readonly=True)
    with env.begin() as transaction:
        assert transaction.get(b"kept", db=env.open_db(b"values", transaction)) == b"x" * 9000
    env.close()


def _is_short(data: Path, size: int) -> bool:
    copy = data.with_name("copy")
    copy.write_bytes(data.read_bytes()[:size])
    try:
        check_length(copy)
    except StoreDamaged:
        return True
    return False


def test_what_a_writer_commits_is_never_taken_for_cut_short(store: Path, root: ExportRoot) -> None:
    with StoreWriter(store) as writer:
        for value in range(60):
            stores.publish_delta(root, VIEW, [{"doc_id": n, "a": value} for n in range(value % 7 * 300 + 1)], files=1)
            catch_up(writer, root, "doc", stores.NullObserver())
            check_length(live_path(store) / "data.mdb")
