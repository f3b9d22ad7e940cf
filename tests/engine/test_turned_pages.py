"""Changed bytes in the pages of the live environment: see `turned_pages`."""

import gc
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.engine.format.schema import FeatureService
from shoal.engine.root.export_root import ExportRoot
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.push.push import push_rows
from tests import stores

VIEW = stores.schema("doc", key="int64", a="int64", text="string")
OTHER = stores.schema("other", key="int64", a="int64")
_PARTS = 2


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Path]:
    """A store of two views, with pushes to both and a few commits."""
    root = ExportRoot(tmp_path / "root")
    stores.publish_snapshot(root, VIEW, [{"doc_id": n, "a": 1, "text": f"text {n}"} for n in range(40)])
    stores.publish_snapshot(root, OTHER, [{"other_id": n, "a": 1} for n in range(40)])
    root.publish_services((FeatureService(name="all", features=("doc:a", "other:a")),))
    # The store is in memory if possible, because thousands of commits are synced.
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as directory:
        store = Path(directory) / "store"
        stores.load(store, root)
        with StoreWriter(store) as writer:
            for value in range(4):
                push_rows(writer, "doc", {"doc_id": [value], "a": [value], "text": ["pushed"]}, request_id=f"d{value}")
                push_rows(writer, "other", {"other_id": [value], "a": [value]}, request_id=f"o{value}")
        del writer
        gc.collect()
        shutil.rmtree(store / "run")
        yield store


def test_a_byte_that_turns_in_the_head_of_any_page_is_damage_or_changes_nothing(store: Path) -> None:
    command = [sys.executable, "-m", "tests.engine.turned_pages", str(store)]
    parts = [
        subprocess.Popen(
            [*command, f"{part}", f"{_PARTS}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for part in range(_PARTS)
    ]
    ended: Counter[str] = Counter()
    for part in parts:
        output, _ = part.communicate()
        assert part.returncode == 0, output.splitlines()[-20:]
        ended.update(line.rpartition(": ")[2] for line in output.splitlines())
    assert ended["damaged"] > 500
    assert ended["same"] > 100
    assert set(ended) <= {"damaged", "same", "view damaged"}
