"""Verification finds every problem in an export root or a store, and continues after each."""

import shutil
from pathlib import Path

import lmdb
import pytest

from shoal.engine.base.errors import NotPublished
from shoal.engine.format.paths import generations_path, live_path
from shoal.engine.root.export_root import SERVICES, ExportRoot
from shoal.loaders.backup.verify import verify, verify_root, verify_store
from tests import stores
from tests.every_type import ITEMS, USERS, item_rows, user_rows


@pytest.fixture
def root(tmp_path: Path) -> ExportRoot:
    root = ExportRoot(tmp_path / "root")
    stores.publish_snapshot(root, ITEMS, item_rows(50))
    stores.publish_delta(root, ITEMS, item_rows(20), [{"items_id": "gone"}])
    stores.publish_snapshot(root, USERS, user_rows(10))
    return root


@pytest.fixture
def store(tmp_path: Path, root: ExportRoot) -> Path:
    stores.load(tmp_path / "store", root)
    stores.publish_snapshot(root, ITEMS, item_rows(60))
    stores.publish_delta(root, ITEMS, item_rows(5), [{"items_id": "item-7"}])
    stores.load(tmp_path / "store", root)
    return tmp_path / "store"


def problems(path: Path) -> dict[str, str]:
    return {checked.what: checked.problem for checked in verify(path) if checked.problem}


def test_what_is_whole_has_no_problem(root: ExportRoot, store: Path) -> None:
    assert problems(root.path) == problems(store) == {}
    entries = {checked.what: checked.rows for checked in verify_root(root)}
    assert entries == {
        "services.json": 0,
        "items seq 1 (snapshot)": 53,
        "items seq 2 (delta)": 24,
        "items seq 3 (snapshot)": 63,
        "items seq 4 (delta)": 9,
        "users seq 1 (snapshot)": 10,
    }
    segments = [checked.rows for checked in verify_store(store)]
    # The first two are the record of the store's progress and the live environment.
    assert sorted(segments) == [0, 0, 9, 10, 53, 63]


def test_what_is_neither_a_root_nor_a_store_is_told(tmp_path: Path) -> None:
    with pytest.raises(NotPublished, match="is neither a store nor an export root"):
        verify(tmp_path)


def test_damage_of_a_root_is_found_entry_by_entry(root: ExportRoot, store: Path) -> None:
    log = root.path / "items" / "deltas"
    part = next((log / f"{2:012d}").glob("*.parquet"))
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    assert list(problems(root.path)) == ["items seq 2 (delta)"]
    (log / f"{3:012d}" / "manifest.json").write_bytes(b"{}")
    assert list(problems(root.path)) == ["items seq 2 (delta)", "items seq 3"]
    shutil.rmtree(log / f"{3:012d}")
    found = problems(root.path)
    assert "does not continue seq 2" in found["items seq 4"]
    (root.path / SERVICES).write_bytes(b"[]")
    assert "services.json" in problems(root.path)


def test_a_turned_bit_in_a_base_is_found_wherever_it_is(store: Path) -> None:
    (path,) = generations_path(store, "users").glob("*/data.mdb")
    content = path.read_bytes()
    begin = content.index(b"SHOALSEG")
    for position in (begin + 200, begin + 1000, begin + 2000):
        path.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
        (problem,) = problems(store).items()
        assert problem[0].startswith("users ")
        assert "has the checksum" in problem[1]
    path.write_bytes(content)
    assert problems(store) == {}


def test_a_turned_bit_in_an_overlay_is_found(store: Path) -> None:
    env = lmdb.open(str(live_path(store)), max_dbs=2)
    with env.begin(write=True) as transaction:
        db = env.open_db(b"segments", transaction)
        key, value = next(iter(transaction.cursor(db=db)))
        transaction.put(key, value[:700] + bytes([value[700] ^ 1]) + value[701:], db=db)
    env.close()
    (what,) = problems(store)
    assert what.startswith("items items.")


def test_damage_of_a_kept_generation_is_found(store: Path) -> None:
    kept = sorted(path for path in generations_path(store, "items").iterdir())[0]
    (kept / "data.mdb").write_bytes(b"x" * 50_000)
    (problem,) = problems(store).items()
    assert problem[0] == f"items {kept.name} (kept)"
    shutil.rmtree(kept)
    (problem,) = problems(store).items()
    assert "is missing, though the catalog names it" in problem[1]


def test_a_generation_that_nobody_names_is_found(store: Path) -> None:
    (generations_path(store, "items") / "stray").mkdir()
    assert problems(store) == {
        "items stray": f"{store}/generations/items/stray is not in the catalog; the next writer removes it"
    }
