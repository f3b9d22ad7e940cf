"""Warming compiles every kernel that lookups call, with the same types. A missing kernel costs the first request half a
second."""

import subprocess
import sys
from pathlib import Path

from shoal.engine.root.export_root import ExportRoot
from tests import stores
from tests.every_type import ITEMS, USERS, item_rows, user_rows

PROGRAM = """
import sys
from numba.core.dispatcher import Dispatcher
from shoal import FeatureStore
from shoal.engine.kernels import answering, finding, gathering, hashing, warm

def compiled():
    modules = (answering, finding, gathering, hashing)
    return {name: len(f.signatures) for m in modules for name, f in vars(m).items() if isinstance(f, Dispatcher)}

warm()
warmed = compiled()
store = FeatureStore.open(sys.argv[1])
for keys in (["nulls", "item-1", "new", "none"], ["extremes"]):
    store.lookup(["items:*", "users:*"], {"items_id": keys, "users_id": 3}).to_arrow()
    store.lookup(["items:single"], {"items_id": keys}, stale="serve").to_numpy()
assert compiled() == warmed, (warmed, compiled())
"""


def test_lookups_find_every_kernel_compiled(tmp_path: Path) -> None:
    root = ExportRoot(tmp_path / "root")
    stores.publish_snapshot(root, ITEMS, item_rows(50))
    stores.publish_snapshot(root, USERS, user_rows(5))
    stores.publish_delta(root, ITEMS, [{"items_id": "new"}])
    stores.load(tmp_path / "store", root)
    subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path / "store")], check=True, timeout=120)
