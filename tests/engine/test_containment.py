"""A publisher in an export root cannot make a reader read files outside the root, and cannot make a reader wait."""

import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from shoal.engine.base.errors import (
    FileDamaged,
    GenerationNotKept,
    LookupInvalid,
    ManifestInvalid,
    NotPublished,
)
from shoal.engine.format.schema import FeatureService
from shoal.engine.root.export_root import MANIFEST, SERVICES, ExportRoot
from shoal.engine.root.manifest import FeatureServices, Manifest, seal
from shoal.loaders.backup.verify import verify
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.follow.load import load
from shoal.loaders.follow.reload import ReloadOrder, reload_view
from shoal.loaders.writer import LogObserver
from tests import stores

VIEW = stores.schema("doc", a="int32")
ROWS: list[stores.Row] = [{"doc_id": str(number), "a": number} for number in range(30)]


@pytest.fixture
def root(tmp_path: Path) -> ExportRoot:
    root = ExportRoot(tmp_path / "root")
    stores.publish_snapshot(root, VIEW, ROWS, files=1)
    root.publish_services((FeatureService(name="all", features=("doc:*",)),))
    return root


def moved_out(path: Path, tmp_path: Path) -> Path:
    """Move a file or directory elsewhere, put a link in its place, and return the new path."""
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    return elsewhere


def file_of(root: ExportRoot) -> Path:
    manifest = root.entry("doc", 1)
    return root.directory(manifest) / manifest.files[0].path


@pytest.mark.parametrize("what", ["file", "its directory", "view"])
def test_links_out_of_the_root_are_not_followed(root: ExportRoot, tmp_path: Path, what: str) -> None:
    """The links lead to valid files. They are refused all the same: a checksum would confirm a guess about any file."""
    path = {"file": file_of(root), "its directory": file_of(root).parent, "view": root.path / "doc"}[what]
    elsewhere = moved_out(path, tmp_path)
    with StoreWriter(tmp_path / "store") as writer:
        with pytest.raises((FileDamaged, ManifestInvalid), match=f"leads to {elsewhere}.*, outside the export root"):
            load(writer, root, LogObserver())
        assert writer.version().views == {}
    assert any(check.problem and "outside the export root" in check.problem for check in verify(root.path))


@pytest.mark.parametrize("what", ["", f"{1:012d}", f"{1:012d}/{MANIFEST}"])
def test_a_log_is_not_read_from_elsewhere(root: ExportRoot, tmp_path: Path, what: str) -> None:
    moved_out(root.path / "doc" / "deltas" / what, tmp_path)
    with pytest.raises(ManifestInvalid, match="outside the export root"):
        root.entry("doc", 1)


def test_services_are_not_read_from_elsewhere(root: ExportRoot, tmp_path: Path) -> None:
    moved_out(root.path / SERVICES, tmp_path)
    with pytest.raises(ManifestInvalid, match="outside the export root"):
        root.services()


def test_links_inside_the_root_and_to_it_are_followed(root: ExportRoot, tmp_path: Path) -> None:
    file = file_of(root)
    file.rename(file.with_name("other.parquet"))
    file.symlink_to("other.parquet")
    (tmp_path / "link").symlink_to(root.path)
    with StoreWriter(tmp_path / "store") as writer:
        assert [applied.rows for applied in load(writer, ExportRoot(tmp_path / "link"), LogObserver())] == [30]


def test_a_pipe_makes_nobody_wait(root: ExportRoot, tmp_path: Path) -> None:
    for path in (file_of(root), root.path / SERVICES):
        path.unlink()
        os.mkfifo(path)
    with pytest.raises(ManifestInvalid, match="is not a plain file"):
        root.services()
    (root.path / SERVICES).unlink()
    with StoreWriter(tmp_path / "store") as writer, pytest.raises(FileDamaged, match="is not a plain file"):
        load(writer, root, LogObserver())


NAMES = ["../part-0.parquet", "/etc/passwd", "..", ".", "", ".hidden", "a/b", "a\\b", "a\0b", "a\nb"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("member", ["path", "state"])
def test_names_in_a_manifest_stay_in_their_directory(root: ExportRoot, member: str, name: str) -> None:
    content: dict[str, Any] = root.entry("doc", 1).model_dump()
    if member == "path":
        content["files"][0]["path"] = name
    else:
        content["state"] = name
    with pytest.raises(ValidationError, match="is not a plain file name"):
        Manifest.model_validate(content)


@pytest.mark.parametrize("name", ["../other", "..", "/etc", "a/b", "", "a\n", "a\0"])
def test_names_of_views_and_services_are_no_paths(root: ExportRoot, name: str) -> None:
    content: dict[str, Any] = root.entry("doc", 1).model_dump()
    content["view"]["name"] = name
    with pytest.raises(ValidationError, match="String should match pattern"):
        Manifest.model_validate(content)
    with pytest.raises(ValidationError, match="String should match pattern"):
        FeatureServices(services=(FeatureService(name=name, features=("doc:a",)),))


def test_what_looks_like_a_number_is_no_seq(root: ExportRoot) -> None:
    for name in ("\u00b2", "\u0663"):
        (root.path / "doc" / "deltas" / name).mkdir()
        (root.path / "doc" / "deltas" / name / MANIFEST).write_bytes(seal(root.entry("doc", 1)))
    assert root.sequence_numbers("doc") == [1]


@pytest.mark.parametrize("name", ["../root/doc", "/etc", "..", ".", "doc/../doc"])
def test_a_request_to_reload_names_views_and_not_paths(root: ExportRoot, tmp_path: Path, name: str) -> None:
    with StoreWriter(tmp_path / "store") as writer:
        load(writer, root, LogObserver())
        before = sorted((tmp_path / "store").rglob("*"))
        with pytest.raises(NotPublished):
            reload_view(writer, root, name, ReloadOrder(view=name), LogObserver())
        for view in ("doc", name):
            with pytest.raises((GenerationNotKept, LookupInvalid)):
                reload_view(writer, root, view, ReloadOrder(view=view, snapshot=name), LogObserver())
        assert sorted((tmp_path / "store").rglob("*")) == before
