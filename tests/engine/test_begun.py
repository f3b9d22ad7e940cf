"""A store that has lost data is damaged: nobody reads it as an empty store, and nobody begins a new one."""

import gc
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import lmdb
import pytest

from shoal import FeatureStore
from shoal.engine.base.errors import NotPublished, StoreDamaged
from shoal.engine.format import catalog
from shoal.engine.format.paths import DATA, live_path
from shoal.engine.format.progress import FILE_BYTES, SLOT_OFFSETS, begun_path, read_begun
from shoal.engine.format.schema import FeatureService
from shoal.engine.format.seal import KEY
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.store.environment import open_live
from shoal.loaders.backup.verify import verify
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.push.push import push_rows
from tests import stores

VIEW = stores.schema("doc", key="int64", a="int64")
OTHER = stores.schema("other", key="int64", a="int64")
PUSHED = 100


@pytest.fixture
def root(tmp_path: Path) -> ExportRoot:
    root = ExportRoot(tmp_path / "root")
    stores.publish_snapshot(root, VIEW, [{"doc_id": n, "a": 1} for n in range(40)])
    stores.publish_snapshot(root, OTHER, [{"other_id": n, "a": 1} for n in range(40)])
    root.publish_services((FeatureService(name="all", features=("doc:a", "other:a")),))
    return root


def push(store: Path, value: int) -> int:
    with StoreWriter(store) as writer:
        return push_rows(writer, "doc", {"doc_id": [1], "a": [value]}).version


@pytest.fixture
def older(tmp_path: Path, root: ExportRoot) -> Path:
    """A copy of the store from before its last push."""
    stores.load(tmp_path / "store", root)
    gc.collect()
    shutil.copytree(tmp_path / "store", tmp_path / "older")
    return tmp_path / "older"


@pytest.fixture
def store(tmp_path: Path, older: Path) -> Path:
    push(tmp_path / "store", PUSHED)
    gc.collect()
    return tmp_path / "store"


def seen(store: Path) -> int:
    (value,) = FeatureStore.open(store).lookup(["doc:a"], {"doc_id": [1]}).to_pydict()["doc:a"]
    assert isinstance(value, int)
    return value


def noted_commits(content: bytes) -> list[int]:
    """Return the commits that the two meta pages of an environment name."""
    return [struct.unpack_from("<Q", content, 4096 * page + 144)[0] for page in (0, 1)]


# --- a store that has less than it had ------------------------------------------------------------------------------


def no_nodes(store: Path) -> None:
    """Make the main page say that it has no nodes, as in an empty environment."""
    data = live_path(store) / DATA
    content = data.read_bytes()
    commits = noted_commits(content)
    newest = 4096 * commits.index(max(commits))
    (main,) = struct.unpack_from("<Q", content, newest + 128)
    with data.open("r+b") as file:
        file.seek(4096 * main + 12)
        file.write(b"\x10")


def older_commit(store: Path) -> None:
    """Give the newest commit the number of an old one, so that LMDB uses the commit before it."""
    data = live_path(store) / DATA
    commits = noted_commits(data.read_bytes())
    with data.open("r+b") as file:
        file.seek(4096 * commits.index(max(commits)) + 144)
        file.write(struct.pack("<Q", 1))


def older_commit_first(store: Path) -> None:
    """Give the commit before the newest one a higher number than the newest."""
    data = live_path(store) / DATA
    commits = noted_commits(data.read_bytes())
    with data.open("r+b") as file:
        file.seek(4096 * commits.index(min(commits)) + 144)
        file.write(struct.pack("<Q", min(commits) + 2))


def without_an_entry(store: Path) -> None:
    """Remove a view's record from the catalog. The catalog's seal has the new commit's id, but its number of entries
    still includes the record."""
    _change_catalog(store, b"view:other", None)


def changed_services(store: Path) -> None:
    _change_catalog(store, b"services", b'{"services":[]}')


def _change_catalog(store: Path, key: bytes, value: bytes | None) -> None:
    program = "import sys, lmdb; from shoal.engine.format import seal\n"
    program += "env = lmdb.open(sys.argv[1], max_dbs=3); db = env.open_db(b'catalog'); key = sys.argv[2].encode()\n"
    program += "with env.begin(write=True) as transaction:\n"
    program += "    value = sys.argv[3].encode()\n"
    program += "    transaction.put(key, value, db=db) if value else transaction.delete(key, db=db)\n"
    program += "    seal.seal_commit(transaction, db)\n"
    arguments = [str(live_path(store)), key.decode(), value.decode() if value else ""]
    subprocess.run([sys.executable, "-c", program, *arguments], check=True)


def replaced_by(store: Path, other: Path) -> None:
    shutil.copyfile(live_path(other) / DATA, live_path(store) / DATA)


def another_store(store: Path) -> None:
    stores.load(store.with_name("another"), ExportRoot(store.with_name("root")))
    for value in range(20):
        push(store.with_name("another"), value)
    gc.collect()
    replaced_by(store, store.with_name("another"))


def made_by_hand(store: Path, number: str = "2") -> None:
    (store / "live" / number).mkdir()


def empty_environment(store: Path) -> None:
    made_by_hand(store, "7")
    lmdb.open(str(store / "live" / "7"), max_dbs=3).close()


def older_beside(store: Path) -> None:
    made_by_hand(store, "7")
    shutil.copyfile(store.with_name("older") / "live" / "1" / DATA, store / "live" / "7" / DATA)


def remove(*paths: Path) -> None:
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def without_live_and_record_damaged(store: Path) -> None:
    remove(store / "live")
    begun_path(store).write_bytes(b"x" * FILE_BYTES)


LESS: dict[str, Callable[[Path], object]] = {
    "a page without nodes": no_nodes,
    "the newest commit noted as an old one": older_commit,
    "the older commit noted as a newer one": older_commit_first,
    "an entry vanished from the catalog": without_an_entry,
    "an entry changed in the catalog": changed_services,
    "live moved away": lambda store: (store / "live").rename(store / "aside"),
    "live empty": lambda store: shutil.rmtree(store / "live" / "1"),
    "live/1 empty": lambda store: (live_path(store) / DATA).unlink(),
    "data.mdb empty": lambda store: os.truncate(live_path(store) / DATA, 0),
    "data.mdb of an older copy": lambda store: replaced_by(store, store.with_name("older")),
    "data.mdb of another store": another_store,
    "live/2 made by hand": made_by_hand,
    "live/7 made by hand, an empty environment": empty_environment,
    "live/7 made by hand, of an older copy": older_beside,
    "live and the bases gone": lambda store: remove(store / "live", store / "generations"),
    "live and the record gone": lambda store: remove(store / "live", begun_path(store)),
    "live gone and the record damaged": without_live_and_record_damaged,
}


@pytest.mark.parametrize("how", LESS)
def test_less_than_was_there_is_damage_and_no_new_store(store: Path, root: ExportRoot, how: str) -> None:
    LESS[how](store)
    gc.collect()
    before = {path: path.stat().st_size for path in store.rglob("*") if path.name == DATA}
    with pytest.raises(StoreDamaged, match="`shoal store accept-loss`"):
        FeatureStore.open(store)
    with pytest.raises(StoreDamaged, match="`shoal store accept-loss`"):
        StoreWriter(store)
    with pytest.raises(StoreDamaged):
        stores.load(store, root)
    # Nothing was written, and nothing prevents a repair.
    assert {path: path.stat().st_size for path in store.rglob("*") if path.name == DATA} == before
    if how != "live and the record gone":
        assert [checked.what for checked in verify(store) if checked.problem and checked.what != "begun"] == ["live"]
    else:
        with pytest.raises(NotPublished):
            list(verify(store))


HOLDS = (
    "import sys; from shoal import FeatureStore; held = FeatureStore.open(sys.argv[1]).version(); print(flush=True)\n"
)


@pytest.mark.parametrize("how", ["a page without nodes", "the newest commit noted as an old one"])
def test_damage_is_found_though_another_process_has_the_store_open(store: Path, how: str) -> None:
    """The notes of such a process in LMDB's lock file apply to all processes that open the store later."""
    command = [sys.executable, "-c", HOLDS, str(store)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "\n"
        LESS[how](store)
        for open_store in (FeatureStore.open, StoreWriter):
            with pytest.raises(StoreDamaged):
                open_store(store)
        process.kill()


# --- a store that has all of its data -------------------------------------------------------------------------------


def one_slot(store: Path) -> None:
    """Damage the newer slot, as if its write had been interrupted."""
    content = bytearray(begun_path(store).read_bytes())
    commits = [struct.unpack_from("<Q", content, offset + 32)[0] for offset in SLOT_OFFSETS]
    content[SLOT_OFFSETS[commits.index(max(commits))] + 40] ^= 1
    begun_path(store).write_bytes(content)


NOT_LESS: dict[str, Callable[[Path], object]] = {
    "nothing": lambda store: None,
    "the record gone": lambda store: begun_path(store).unlink(),
    "the record damaged": lambda store: begun_path(store).write_bytes(b"x" * FILE_BYTES),
    "the record empty": lambda store: os.truncate(begun_path(store), 0),
    "one slot damaged": one_slot,
    "the record of an earlier commit": lambda store: shutil.copy(begun_path(store.with_name("older")), store),
    "run/ gone": lambda store: shutil.rmtree(store / "run"),
    "moved as a whole": lambda store: [store.rename(store.with_name("moved")), store.with_name("moved").rename(store)],
}


@pytest.mark.parametrize("how", NOT_LESS)
def test_a_record_that_is_gone_or_behind_takes_nothing_along(store: Path, how: str) -> None:
    NOT_LESS[how](store)
    assert seen(store) == PUSHED
    version = push(store, PUSHED + 1)
    gc.collect()
    assert seen(store) == PUSHED + 1
    # From here on, the store behaves as usual.
    begun = read_begun(store)
    assert begun is not None
    assert (begun.live, begun.commit) == (1, version)
    assert [checked for checked in verify(store) if checked.problem] == []
    (store / "live").rename(store / "aside")
    with pytest.raises(StoreDamaged):
        StoreWriter(store)


def test_a_store_of_an_earlier_release_gets_its_record_from_its_first_writer(store: Path) -> None:
    """The earlier release wrote no seal and no record. If it wrote to a newer store, the seal is an old one."""
    for how in ("never sealed", "sealed, then written to without"):
        with lmdb.open(str(live_path(store)), max_dbs=3) as env, env.begin(write=True) as transaction:
            db = env.open_db(b"catalog", transaction)
            if how == "never sealed":
                transaction.delete(KEY, db=db)
            record = catalog.Trouble.model_validate({"code": "E", "message": "m", "since": "2026-01-01T00:00:00Z"})
            transaction.put(b"trouble:other", record.model_dump_json().encode(), db=db)
        if how == "never sealed":
            begun_path(store).unlink()
        assert seen(store) == PUSHED
        assert set(FeatureStore.open(store).version().troubles) == {"other"}
        gc.collect()
        StoreWriter(store).close()
        begun = read_begun(store)
        assert begun is not None
        assert begun.commit == open_live(store, writable=True).last_transaction()
        assert FeatureStore.open(store).version().id == begun.commit
        gc.collect()
        without_an_entry(store)
        with pytest.raises(StoreDamaged, match="entries were lost or changed"):
            FeatureStore.open(store)
        (live_path(store) / DATA).write_bytes((live_path(store.with_name("older")) / DATA).read_bytes())
        begun_path(store).unlink()
        gc.collect()
        push(store, PUSHED)
        gc.collect()


KILLED = """
import os, signal, sys
from pathlib import Path
from shoal.loaders.push.push import push_rows
from shoal.loaders.commit.store_writer import StoreWriter
writer = StoreWriter(Path(sys.argv[1]))
for value in range(50):
    version = push_rows(writer, "doc", {"doc_id": [1], "a": [value]}).version
print(version, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_record_is_exact_once_the_writer_was_killed(store: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(store)], capture_output=True, text=True)
    begun = read_begun(store)
    assert begun is not None
    assert begun.commit == int(done.stdout)
    assert begun_path(store).stat().st_size == FILE_BYTES
    assert begun_path(store).stat().st_blocks * 512 >= FILE_BYTES


def test_a_record_that_cannot_be_written_fails_no_push(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    with StoreWriter(store) as writer:
        begun_path(store).unlink()
        begun_path(store).mkdir()
        for value in range(3):
            push_rows(writer, "doc", {"doc_id": [1], "a": [value]})
            writer.sync()
        assert len([line for line in caplog.messages if "cannot be written" in line]) == 1
        begun_path(store).rmdir()
        version = push_rows(writer, "doc", {"doc_id": [1], "a": [3]}).version
        writer.sync()
        begun = read_begun(store)
        assert begun is not None
        assert begun.commit == version
