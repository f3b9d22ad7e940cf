"""Snapshots that contradict their manifest are rejected by name, the previous version stays, and a repaired one is
loaded.

Deltas that contradict their manifest are tested in test_published_rows.
"""

from pathlib import Path
from typing import Any

import pytest

from shoal import FeatureStore
from shoal.engine.base.errors import FileDamaged, SchemaChangeRefused
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.root.manifest import Manifest
from tests import stores

VIEW = stores.schema("doc", key="int64", a="int64", text="string")


def rows(value: int) -> list[stores.Row]:
    return [{"doc_id": number, "a": value, "text": f"text {number}"} for number in range(20)]


@pytest.fixture
def root(tmp_path: Path) -> ExportRoot:
    root = ExportRoot(tmp_path / "root")
    stores.publish_snapshot(root, VIEW, rows(0))
    return root


@pytest.fixture
def manifest(store: Path, root: ExportRoot) -> Manifest:
    """A newer snapshot that is not loaded yet."""
    return stores.publish_snapshot(root, VIEW, rows(1), files=1)


def seen(store: Path) -> set[int]:
    return set(FeatureStore.open(store).lookup(["doc:a"], {"doc_id": list(range(20))}).to_pydict()["doc:a"])


def check_refused(store: Path, root: ExportRoot, message: str, **options: Any) -> None:
    with pytest.raises(FileDamaged, match=message):
        stores.load(store, root, **options)
    assert seen(store) == {0}
    assert FeatureStore.open(store).version().troubles["doc"].code == "FileDamaged"


def check_mended(store: Path, root: ExportRoot) -> None:
    stores.load(store, root)
    assert seen(store) == {1}
    assert FeatureStore.open(store).version().troubles == {}


def test_a_snapshot_that_lies_of_its_files_is_refused(store: Path, root: ExportRoot, manifest: Manifest) -> None:
    (file,) = (file.model_dump() for file in manifest.files)
    lies: list[tuple[dict[str, Any], str]] = [
        ({"rows": 21, "files": [file | {"rows": 21}]}, "has 20 rows, its manifest says 21"),
        ({"files": [file | {"bytes": file["bytes"] - 1}]}, "bytes, its manifest says"),
        ({"files": [file | {"checksum": "f" * 16}]}, "has the checksum"),
        ({"files": [file | {"path": "part-00007.parquet"}]}, "is missing; its manifest lists 20 rows"),
        ({"files": [file | {"min_key_hash": file["min_key_hash"] + 1}]}, "outside the range in its manifest"),
    ]
    for lie, message in lies:
        stores.falsify(root, manifest, **lie)
        check_refused(store, root, message)
    stores.falsify(root, manifest)
    check_mended(store, root)


def test_a_snapshot_that_lies_of_its_schema_is_refused(store: Path, root: ExportRoot, manifest: Manifest) -> None:
    schema = manifest.view.model_dump(mode="json")
    number, text = schema["features"]
    stores.falsify(root, manifest, view=schema | {"features": [number, text, {"name": "b", "type": "bool"}]})
    check_refused(store, root, "has no columns 'b', its manifest lists one of type bool")
    stores.falsify(root, manifest, view=schema | {"features": [number | {"type": "float64"}, text]})
    with pytest.raises(SchemaChangeRefused, match="changed from int64 to float64"):
        stores.load(store, root)
    check_refused(store, root, "column 'a' is int64, its manifest says", accept_schema_change=True)
    stores.falsify(root, manifest)
    check_mended(store, root)


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_a_turned_bit_in_a_snapshot_is_found(store: Path, root: ExportRoot, manifest: Manifest, place: float) -> None:
    path = root.directory(manifest) / manifest.files[0].path
    whole = path.read_bytes()
    content = bytearray(whole)
    content[int(place * len(content))] ^= 16
    path.write_bytes(content)
    check_refused(store, root, "part-00000.parquet")
    path.write_bytes(whole)
    check_mended(store, root)
