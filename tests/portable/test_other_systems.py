"""Behaviour on systems without Linux's own calls, such as macOS: the calls are removed before Shoal is imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]

WITHOUT_LINUX = """
import os, sys
# These look at the system when they are imported.
import asyncio, urllib.request, numba, psutil, pyarrow, uvloop, watchfiles
sys.platform = "darwin"
for name in "posix_fallocate posix_fadvise fdatasync sched_getaffinity sched_setaffinity O_PATH O_DIRECT".split():
    delattr(os, name)
"""

IN_PROCESS = """
from pathlib import Path
from shoal import Feature, FeatureStore, JoinKey, StoreWriter, ViewSchema, define_view, push_rows
key = JoinKey(name="doc_id", type="string")
view = ViewSchema(name="docs", join_keys=(key,), features=(Feature(name="clicks", type="int64"),))
with StoreWriter(Path("store")) as writer:
    define_view(writer, view)
    push_rows(writer, "docs", {"doc_id": ["a", "b"], "clicks": [1, 2]})
with FeatureStore.open("store") as store:
    print(store.lookup(["docs:clicks"], {"doc_id": ["b", "a"]}).to_pydict())
"""

LOAD = """
from shoal.engine.root.export_root import ExportRoot
from tests import stores
root = ExportRoot("root")
view = stores.schema("docs", clicks="int64", title="string")
stores.publish_snapshot(root, view, [{"docs_id": "a", "clicks": 1, "title": "t"}])
stores.publish_delta(root, view, [{"docs_id": "b", "clicks": 2}])
sys.argv = ["shoal", "load", "--store", "loaded", "--from", "root"]
from shoal.cli import main
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
sys.argv = ["shoal", "lookup", "--store", "loaded", "--features", "docs:clicks", "--key", "docs_id=b", "--json"]
main()
"""


def run(program: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-c", WITHOUT_LINUX + program]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("program", "printed"), [(IN_PROCESS, "{'docs:clicks': [2, 1]}"), (LOAD, '"value": 2')], ids=["in process", "load"]
)
def test_stores_are_written_and_read(tmp_path: Path, program: str, printed: str) -> None:
    ran = run(program, tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert printed in ran.stdout


def test_serve_refuses_in_one_line(tmp_path: Path) -> None:
    ran = run("sys.argv = ['shoal', 'serve', '--store', 'store']; from shoal.cli import main; main()", tmp_path)
    assert ran.returncode == 1
    assert re.fullmatch("shoal: `shoal serve` needs Linux, but this is darwin; .*\n", ran.stderr)
    assert not (tmp_path / "store").exists()


def test_the_commands_and_the_exporter_are_imported(tmp_path: Path) -> None:
    ran = run("import shoal.cli, shoal.client.aio, shoal.spark_export.exporter", tmp_path)
    assert ran.returncode == 0, ran.stderr
