"""If a view's data is damaged, errors name the view, and the other views are served. A reader that has an older version
of the view keeps using it."""

import os
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shoal import FeatureStore
from shoal.engine.base.errors import StoreUnreadable, UnknownFeature, ViewDamaged
from shoal.engine.format.paths import generation_path
from shoal.engine.format.schema import FeatureService
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.status.store import describe_version, describe_views
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.follow.load import catch_up
from tests import stores
from tests.damage import base_path, every_harm, harm

VIEW = stores.schema("doc", key="int64", a="int64", text="string")
OTHER = stores.schema("other", key="int64", a="int64")
KEYS = {"doc_id": [1, 30], "other_id": 1}


def rows(value: int, count: int = 40) -> list[stores.Row]:
    return [{"doc_id": number, "a": value, "text": f"{value} " * 50} for number in range(count)]


def other(value: int) -> list[stores.Row]:
    return [{"other_id": number, "a": value} for number in range(40)]


@pytest.fixture
def root(tmp_path: Path) -> ExportRoot:
    root = ExportRoot(tmp_path / "root")
    stores.publish_snapshot(root, VIEW, rows(1))
    stores.publish_delta(root, VIEW, rows(2, 20))
    stores.publish_snapshot(root, OTHER, other(1))
    root.publish_services((FeatureService(name="all", features=("doc:a", "other:a")),))
    return root


@pytest.fixture
def store(tmp_path: Path, root: ExportRoot) -> Path:
    """A store of two views. The first view has a base and an overlay."""
    stores.load(tmp_path / "store", root)
    return tmp_path / "store"


def seen(reader: FeatureStore, view: str = "doc") -> list[int]:
    found: list[int] = reader.lookup([f"{view}:a"], KEYS).to_pydict()[f"{view}:a"]
    return found


@every_harm
def test_a_damaged_view_is_named_and_the_others_are_served(store: Path, how: str) -> None:
    harm(store, "doc", how)
    reader = FeatureStore.open(store)
    assert seen(reader, "other") == [1, 1]
    for asked in (["doc:a"], ["doc:*"], ["other:a", "doc:a"], "all"):
        for look_up in (reader.lookup, reader.lookup_matrix):
            with pytest.raises(
                ViewDamaged, match=r"view 'doc' cannot be served: .*; `shoal load` loads the view again"
            ):
                look_up(asked, KEYS)
    with pytest.raises(UnknownFeature, match="no view 'nowhere'"):
        reader.lookup(["nowhere:a"], KEYS)
    version = reader.version()
    described = {view["name"]: view for view in describe_version(version)["views"]}
    assert described["doc"]["damage"] == version.damaged["doc"].message
    assert described["other"]["damage"] is None
    assert [view["name"] for view in describe_views(version)["views"]] == ["other"]


@pytest.mark.parametrize("size", [1, 8192, 12288, -8192])
def test_a_base_cut_short_anywhere_is_damaged(store: Path, size: int) -> None:
    path = base_path(store, "doc")
    os.truncate(path, size % path.stat().st_size)
    assert set(FeatureStore.open(store).version().damaged) == {"doc"}


def test_who_has_an_older_version_goes_on_with_it(store: Path, root: ExportRoot) -> None:
    with StoreWriter(store) as writer:
        reader = FeatureStore.open(store)
        manifest = stores.publish_snapshot(root, VIEW, rows(3))
        catch_up(writer, root, "doc", stores.NullObserver())
        generation = generation_path(store, "doc", manifest.snapshot_id)
        generation.rename(store / "aside")
        assert seen(reader) == [2, 1]
        assert set(reader.version().damaged) == {"doc"}
        # The damage does not delay other views, and the old version lasts for as many commits as necessary.
        for value in range(2, 12):
            stores.publish_delta(root, OTHER, other(value))
            catch_up(writer, root, "other", stores.NullObserver())
            assert (seen(reader), seen(reader, "other")) == ([2, 1], [value] * 2)
        # A reader notices the end of the damage without a new commit.
        (store / "aside").rename(generation)
        deadline = time.monotonic() + 10
        while seen(reader) != [3, 3]:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert reader.version().damaged == {}


@contextmanager
def no_more_descriptors() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_who_has_no_descriptors_left_goes_on_with_what_is_open(store: Path, root: ExportRoot) -> None:
    with StoreWriter(store) as writer:
        reader = FeatureStore.open(store)
        stores.publish_snapshot(root, VIEW, rows(3))
        catch_up(writer, root, "doc", stores.NullObserver())
        with no_more_descriptors():
            assert seen(reader) == [2, 1]
            assert reader.version().damaged["doc"].kind is StoreUnreadable
            # For the writer this is not damage, because loading again would not help.
            assert writer.damage("doc") is None
            assert writer.damage("other") is None
        reader._retry_at = 0.0
        assert seen(reader) == [3, 3]


def test_a_store_without_descriptors_does_not_count_as_damaged(store: Path) -> None:
    with no_more_descriptors(), pytest.raises(StoreUnreadable, match="Too many open files"):
        FeatureStore.open(store)
    assert seen(FeatureStore.open(store)) == [2, 1]


def test_a_view_that_is_held_after_its_files_are_gone_is_intact(store: Path) -> None:
    reader = FeatureStore.open(store)
    assert seen(reader) == [2, 1]
    shutil.rmtree(store / "generations")
    assert seen(reader) == [2, 1]
    for chunk in reader.version().view("doc").segments[-1].chunks:
        chunk.verify()
