"""Views that are dropped from an export root leave the root and the nodes that follow it. A view that is published
again under the same name comes back. Only views that the root does not have can be dropped from a single store."""

import gc
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from shoal import FeatureStore
from shoal.engine.base.errors import (
    IdempotencyKeyReused,
    LogTaken,
    ManifestInvalid,
    NotPublished,
    SchemaChangeRefused,
    ShoalError,
    UnknownFeature,
)
from shoal.engine.format.paths import generation_path
from shoal.engine.format.schema import FeatureService
from shoal.engine.root.export_root import DROPPED, ExportRoot
from shoal.loaders.apply.definition import define_view, drop_view
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.push.push import push_rows
from tests import stores
from tests.cli.test_commands import shoal
from tests.failpoints.test_backup import killed
from tests.server.serving import Server, eventually

OLD = stores.schema("old", key="int64", a="int64")
AGAIN = stores.schema("old", key="string", a="string")
STAYS = stores.schema("stays", key="int64", a="int64")
OWN = stores.schema("own", key="int64", a="int64")
POINTS = ("root.view-dropped",)


@pytest.fixture
def root(tmp_path: Path) -> ExportRoot:
    root = ExportRoot(tmp_path / "root")
    stores.publish_snapshot(root, OLD, [{"old_id": 1, "a": 1}])
    stores.publish_delta(root, OLD, [{"old_id": 2, "a": 2}])
    stores.publish_snapshot(root, STAYS, [{"stays_id": 1, "a": 1}])
    return root


@pytest.fixture
def store(root: ExportRoot, tmp_path: Path) -> Path:
    """A store with all views of the root, a pushed row, and a view of its own."""
    stores.load(tmp_path / "store", root)
    with StoreWriter(tmp_path / "store") as writer:
        push_rows(writer, "old", {"old_id": [3], "a": [3]})
        define_view(writer, OWN)
    return tmp_path / "store"


def views(store: Path) -> list[str]:
    with FeatureStore.open(store) as opened:
        return [*opened.views()]


def publish_again(root: ExportRoot) -> int:
    """Publish another view with the same name, after the dropped log, as an exporter does, and return its seq."""
    return stores.publish_snapshot(root, AGAIN, [{"old_id": "x", "a": "new"}]).seq


def test_a_view_that_is_dropped_from_the_root_leaves_a_running_server_and_comes_back(
    root: ExportRoot, store: Path
) -> None:
    with Server(store, {"root": str(root)}, workers=1) as server:
        server.await_ready()

        def served(view: str, key: object) -> list[object] | None:
            answer = server.lookup([f"{view}:a"], {f"{view}_id": [key]})
            return answer.json["features"][f"{view}:a"] if answer.status == 200 else None

        assert served("old", 3) == [3]
        refused = shoal("drop-view", "old", "--store", store, code=2).stderr
        assert f"drop it from the root: `shoal drop-view old --root {root}`" in refused
        dropped = shoal("drop-view", "old", "--root", root)
        assert "whose last seq is 2" in dropped.stdout
        eventually(lambda: served("old", 3) is None, lambda: f"no view any more; the log is {server.log}")
        assert served("stays", 1) == [1]
        assert "removed, as the root dropped it at seq 2" in server.log
        # A view that no root publishes is dropped through the server.
        shoal("drop-view", "own", "--store", store)
        assert server.ask("GET", "/v1/views").json["views"][0]["name"] == "stays"
        # The new schema is incompatible with the old rows.
        assert publish_again(root) == 3
        eventually(lambda: served("old", "x") == ["new"], lambda: f"the new view; the log is {server.log}")
        stores.publish_delta(root, AGAIN, [{"old_id": "x", "a": "newer"}])
        eventually(lambda: served("old", "x") == ["newer"], lambda: f"its delta; the log is {server.log}")
    assert not (store / "generations" / "own").exists()


def test_a_load_removes_what_the_root_dropped(root: ExportRoot, store: Path) -> None:
    with pytest.raises(NotPublished, match="has no view 'none'; it has old, stays"):
        root.drop_view("none")
    assert root.drop_view("old") == 2
    assert root.views() == ["stays"]
    assert not (root.path / "old").exists()
    (applied,) = stores.load(store, root)
    assert (applied.view, applied.kind, applied.seq) == ("old", "drop", 2)
    assert views(store) == ["own", "stays"]
    assert stores.load(store, root) == []
    # A node that missed both the drop and the new export loads the new view.
    publish_again(root)
    stores.load(store, root)
    assert FeatureStore.open(store).lookup(["old:a"], {"old_id": ["x"]}).to_pydict() == {"old:a": ["new"]}


def test_a_node_that_slept_through_a_drop_and_a_new_export_starts_over(root: ExportRoot, store: Path) -> None:
    with pytest.raises(SchemaChangeRefused):
        AGAIN.check_succeeds(OLD)
    root.drop_view("old")
    publish_again(root)
    stores.load(store, root)
    assert FeatureStore.open(store).lookup(["old:a"], {"old_id": ["x"]}).to_pydict() == {"old:a": ["new"]}
    assert root.drop_view("old") == 3
    assert root.drop_view("old") == 3, "nothing is left to do"
    stores.load(store, root)
    assert views(store) == ["own", "stays"]


def test_a_drop_that_is_killed_is_completed_by_another(root: ExportRoot, store: Path, tmp_path: Path) -> None:
    killed(ExportRoot.drop_view, root, "old", at=POINTS[0], log=tmp_path / "log")  # type: ignore[arg-type]
    assert (root.path / "old" / "deltas").exists()
    # Readers no longer see the view.
    assert root.views() == ["stays"]
    stores.load(store, root)
    assert views(store) == ["own", "stays"]
    assert root.drop_view("old") == 2
    assert not (root.path / "old").exists()


def test_a_list_of_dropped_views_that_is_damaged_keeps_no_view_from_moving_on(root: ExportRoot, store: Path) -> None:
    root.drop_view("old")
    (root.path / DROPPED).write_bytes(b"{}")
    stores.publish_delta(root, STAYS, [{"stays_id": 1, "a": 2}])
    with pytest.raises(ManifestInvalid, match=DROPPED):
        stores.load(store, root)
    assert FeatureStore.open(store).lookup(["stays:a"], {"stays_id": [1]}).to_pydict() == {"stays:a": [2]}
    # No log may begin while an earlier log with the same name cannot be ruled out.
    with pytest.raises(ManifestInvalid, match=DROPPED):
        root.first_seq("old")


def test_views_that_are_dropped_at_the_same_time_are_all_listed(tmp_path: Path) -> None:
    root = ExportRoot(tmp_path / "root")
    names = [f"v{number}" for number in range(12)]
    for name in names:
        stores.publish_snapshot(root, stores.schema(name, key="int64", a="int64"), [{f"{name}_id": 1, "a": 1}])
    with ThreadPoolExecutor(len(names)) as pool:
        assert [*pool.map(lambda name: ExportRoot(root.path).drop_view(name), names)] == [1] * len(names)
    assert root.dropped() == dict.fromkeys(names, 1)
    for name in ("", ".", "../root/v1", "v1/"):
        with pytest.raises(NotPublished, match="has no view"):
            root.drop_view(name)


@pytest.mark.parametrize("how", ["load", "reload", "reload --view old"])
def test_what_was_pushed_to_a_dropped_view_is_not_in_the_next(root: ExportRoot, store: Path, how: str) -> None:
    """The new view has the same schema, and its pushes have the same ids."""
    repeated = {"old_id": [3], "a": [33]}
    with StoreWriter(store) as writer:
        push_rows(writer, "old", repeated, request_id="k1")
    root.drop_view("old")
    stores.publish_snapshot(root, OLD, [{"old_id": 1, "a": 100}])
    stores.publish_snapshot(root, OLD, [{"old_id": 1, "a": 1000}])
    gc.collect()
    shoal(*how.split(), "--store", store, "--from", root)
    keys = {"old_id": [1, 2, 3]}
    assert FeatureStore.open(store).lookup(["old:a"], keys).to_pydict() == {"old:a": [1000, None, None]}
    gc.collect()
    with StoreWriter(store) as writer:
        push_rows(writer, "old", repeated, request_id="k1")
        with pytest.raises(IdempotencyKeyReused):
            push_rows(writer, "old", {"old_id": [3], "a": [34]}, request_id="k1")
    assert FeatureStore.open(store).lookup(["old:a"], keys).to_pydict() == {"old:a": [1000, None, 33]}


def test_another_root_drops_nothing(store: Path, tmp_path: Path) -> None:
    another = ExportRoot(tmp_path / "another")
    for _ in range(3):
        stores.publish_snapshot(another, OLD, [{"old_id": 1, "a": 1}])
    another.drop_view("old")
    stores.publish_snapshot(another, STAYS, [{"stays_id": 1, "a": 1}])
    with suppress(ShoalError):
        stores.load(store, another)
    assert FeatureStore.open(store).lookup(["old:a"], {"old_id": [3]}).to_pydict() == {"old:a": [3]}


def test_a_log_that_is_being_dropped_is_not_continued(root: ExportRoot, tmp_path: Path) -> None:
    killed(ExportRoot.drop_view, root, "old", at=POINTS[0], log=tmp_path / "log")  # type: ignore[arg-type]
    newest = root.sequence_numbers("old")[-1]
    with pytest.raises(LogTaken, match="complete it before you publish the view again: `shoal drop-view old --root"):
        root.check_not_dropped("old", newest)
    root.drop_view("old")
    root.check_not_dropped("old", publish_again(root))


def test_a_view_that_a_service_names_stays(root: ExportRoot) -> None:
    root.publish_services((FeatureService(name="ranker", features=("old:a", "stays:*")),))
    refused = shoal("drop-view", "old", "--root", root, code=2).stderr
    assert f"the feature services ranker of {root} name view 'old'" in refused
    assert root.views() == ["old", "stays"]


def test_a_view_is_dropped_from_a_store_whatever_is_wrong_with_it(root: ExportRoot, store: Path) -> None:
    with FeatureStore.open(store) as opened:
        base = opened.version().view("old").record.base
    gc.collect()
    shutil.rmtree(generation_path(store, "old", base.id))
    shutil.rmtree(root.path)
    shoal("drop-view", "old", "--store", store)
    assert views(store) == ["own", "stays"]
    status = json.loads(shoal("status", "--store", store, "--json").stdout)
    assert [view["name"] for view in status["views"]] == ["own", "stays"]
    gc.collect()
    with StoreWriter(store) as writer, pytest.raises(UnknownFeature, match="no view 'old'; it has own, stays"):
        drop_view(writer, "old")
