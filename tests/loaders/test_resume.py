"""A killed load continues at the chunk where it stopped; readers see the last version meanwhile and afterwards."""

import subprocess
import sys
from pathlib import Path

import pytest

from shoal import FeatureStore
from shoal.engine.format.paths import generations_path
from shoal.engine.root.export_root import ExportRoot
from shoal.loaders.backup.verify import verify_store
from tests import stores
from tests.loaders.forgery import publish, snapshot_table

VIEW = stores.schema("doc", key="int64", a="int64", text="string")
COUNT = 4000
CHUNK_BYTES = 8 << 10
CHUNK_ROWS = 200
"""The number of rows in a chunk of CHUNK_BYTES, with row groups of 100 rows."""


def rows(value: int) -> list[stores.Row]:
    return [{"doc_id": n, "a": value, "text": f"{value}/{n}"} for n in range(COUNT)]


def load(store: Path, root: ExportRoot, *wait_at: int) -> list[str]:
    """Return the lines that a loading process prints. The process is killed once it waits."""
    command = [sys.executable, "-m", "tests.loaders.loading", str(store), str(root), str(CHUNK_BYTES)]
    command += [str(place) for place in wait_at]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        printed = []
        for line in process.stdout:
            printed.append(line.strip())
            if line == "waiting\n":
                process.kill()
    return printed


@pytest.fixture
def root(tmp_path: Path) -> ExportRoot:
    root = ExportRoot(tmp_path / "root")
    stores.publish_snapshot(root, VIEW, rows(1)[:100])
    return root


def test_a_killed_load_goes_on_where_it_died_and_readers_notice_nothing(tmp_path: Path, root: ExportRoot) -> None:
    store = tmp_path / "store"
    assert load(store, root) == ["0", "done"]
    reader = FeatureStore.open(store)
    version = reader.version()

    def check_nothing_changed() -> None:
        found = reader.lookup(["doc:a", "doc:text"], {"doc_id": [0, 99, 100]}).to_pydict()
        assert found == {"doc:a": [1, 1, None], "doc:text": ["1/0", "1/99", None]}
        assert reader.version() is version

    publish(root, VIEW, snapshot_table(VIEW, rows(2)), row_group_size=100)
    done = 0
    for encoded in (100, 1000, 900, 700):
        found, waiting = load(store, root, encoded)
        assert waiting == "waiting"
        assert int(found) >= done
        # At most two chunks are lost: the one that was being encoded and the one that was being written.
        done = int(found) + encoded - 2 * CHUNK_ROWS
        check_nothing_changed()
    found, last = load(store, root)
    assert last == "done"
    assert COUNT > int(found) >= done > 0
    everything = reader.lookup(["doc:a", "doc:text"], {"doc_id": list(range(COUNT))}).to_pydict()
    assert everything == {"doc:a": [2] * COUNT, "doc:text": [f"2/{n}" for n in range(COUNT)]}
    assert [checked for checked in verify_store(store) if checked.problem] == []
    assert not [path for path in generations_path(store, "doc").iterdir() if path.name.startswith(".")]


def test_a_first_load_that_was_killed_leaves_a_store_that_is_loaded_later(tmp_path: Path, root: ExportRoot) -> None:
    store = tmp_path / "store"
    publish(root, VIEW, snapshot_table(VIEW, rows(2)), row_group_size=100)
    load(store, root, 2000)
    assert FeatureStore.open(store).version().views == {}
    load(store, root)
    found = FeatureStore.open(store).lookup(["doc:a"], {"doc_id": list(range(COUNT))}).to_pydict()
    assert found == {"doc:a": [2] * COUNT}
