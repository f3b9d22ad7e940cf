"""Version 0.1.0 next to this version: on a new root, on an old one, and on a store that both versions open in turn.

The old version runs from its released wheel, in separate processes.
"""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from shoal.engine.format.schema import FeatureService
from shoal.engine.root.export_root import MANIFEST, SERVICES, ExportRoot
from shoal.engine.root.manifest import FeatureServices, Manifest
from tests.engine.test_formats import MEMBERS_OF_FORMAT_1
from tests.stores import Row, publish_delta, publish_snapshot, schema, sealed

VIEW = schema("doc", clicks="int64", title="string")
WHEEL = Path(__file__).parent / "shoal-0.1.0-py3-none-any.whl"
NEW = Path(__file__).parents[2]
PUSH = """
with StoreWriter(Path(sys.argv[1])) as writer:
    push_rows(writer, "doc", {"doc_id": [sys.argv[2]], "clicks": [int(sys.argv[3])]}, request_id=sys.argv[2])
"""


def imports(code: Path) -> str:
    """Return the import statements of a program. The module names differ between the versions."""
    if code == NEW:
        names = "from shoal import StoreWriter, push_rows; from shoal.cli import main"
    else:
        names = "from loaders.push import push_rows; from loaders.store_writer import StoreWriter; from cli import main"
    return f"import sys; from pathlib import Path; {names}\n"


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory where version 0.1.0 is installed."""
    directory = tmp_path_factory.mktemp("old")
    with zipfile.ZipFile(WHEEL) as wheel:
        wheel.extractall(directory)
    return directory


def run(code: Path, program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(code)}
    command = [sys.executable, "-P", "-c", imports(code) + program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd="/")


def shoal(code: Path, *arguments: object, exit_code: int = 0) -> str:
    """Return the output of a version's command."""
    done = run(code, "main()", *arguments)
    assert done.returncode == exit_code, done.stdout + done.stderr
    return done.stdout + done.stderr


def push(code: Path, store: Path, key: str, clicks: int) -> None:
    done = run(code, PUSH, store, key, clicks)
    assert done.returncode == 0, done.stderr


def clicks(code: Path, store: Path, *keys: str) -> list[Any]:
    """Return the clicks that a version reads from a store, with None for a key without a row."""
    chosen = [part for key in keys for part in ("--key", f"doc_id={key}")]
    answer = json.loads(shoal(code, "lookup", "--store", store, "--features", "doc:clicks", *chosen, "--json"))
    return [row["value"] for row in answer["rows"]]


def rows(*numbers: int) -> list[Row]:
    return [{"doc_id": f"d{number}", "clicks": number, "title": "t"} for number in numbers]


def write_as_0_1_0(root: ExportRoot, manifest: Manifest) -> None:
    """Seal an entry as version 0.1.0 did, with every member that it knew."""
    content = manifest.model_dump(mode="json", include=MEMBERS_OF_FORMAT_1[Manifest], exclude={"view": {"future"}})
    for directory in {root.directory(manifest), root.path / f"doc/deltas/{manifest.seq:012d}"}:
        (directory / MANIFEST).write_bytes(sealed(content | {"format_version": 1}))


def test_an_old_node_holds_at_a_newer_entry_until_a_snapshot_in_its_format(old: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    newer = ExportRoot(tmp_path / "root")
    older = ExportRoot(newer.path, write_format=1)
    publish_snapshot(older, VIEW, rows(1, 2, 3))
    publish_delta(older, VIEW, [{"doc_id": "d1", "clicks": 10, "title": "t"}])
    older.publish_services((FeatureService(name="ranking", features=("doc:*",)),))
    shoal(old, "load", "--store", store, "--from", older)
    push(old, store, "p", 7)
    publish_delta(newer, VIEW, [{"doc_id": "d2", "clicks": 20, "title": "t"}])
    newer.publish_services((FeatureService(name="ranking", features=("doc:clicks",)),))
    told = shoal(old, "load", "--store", store, "--from", newer, exit_code=1)
    assert "format_version" in told
    assert clicks(old, store, "d1", "d2", "p") == [10, 2, 7]
    publish_snapshot(older, VIEW, rows(1, 2, 4))
    older.publish_services((FeatureService(name="ranking", features=("doc:*",)),))
    shoal(old, "load", "--store", store, "--from", older)
    assert clicks(old, store, "d2", "d4", "p") == [2, 4, 7]


def test_a_new_node_reads_an_old_root_and_goes_on_with_an_old_store_and_back(old: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    root = ExportRoot(tmp_path / "root", write_format=1)
    write_as_0_1_0(root, publish_snapshot(root, VIEW, rows(1, 2, 3)))
    (root.path / SERVICES).write_bytes(
        sealed(FeatureServices(services=()).model_dump(mode="json", exclude={"must_understand"}))
    )
    shoal(old, "load", "--store", store, "--from", root)
    push(old, store, "old", 7)
    write_as_0_1_0(root, publish_delta(root, VIEW, [{"doc_id": "d1", "clicks": 10, "title": "t"}]))
    shoal(NEW, "load", "--store", store, "--from", root)
    push(NEW, store, "new", 8)
    # The old version has already applied this request id.
    push(NEW, store, "old", 9)
    assert clicks(NEW, store, "d1", "d2", "old", "new") == [10, 2, 7, 8]
    # The old version opens the store again and finds everything, and then the new version does.
    assert clicks(old, store, "d1", "d2", "old", "new") == [10, 2, 7, 8]
    push(old, store, "new", 9)
    push(old, store, "back", 11)
    assert "0 bad" in shoal(NEW, "verify", store)
    assert clicks(NEW, store, "d1", "old", "new", "back") == [10, 7, 8, 11]
