"""A node keeps only the schema and the log position of a view in a table."""

import subprocess
import sys
from pathlib import Path

import pytest

from shoal import FeatureStore
from shoal.engine.base.errors import PushElsewhere, SchemaChangeRefused, TableFailed
from shoal.engine.format.schema import ViewSchema
from shoal.engine.kernels.gathering import Status
from shoal.engine.root.export_root import ExportRoot
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.push.push import push_rows
from tests import stores
from tests.dynamodb.tables import remote

VIEW = stores.schema("doc", key="int64", a="int64")
ROWS: list[stores.Row] = [{"doc_id": number, "a": number} for number in range(50)]


@pytest.fixture
def root(tmp_path: Path) -> ExportRoot:
    return ExportRoot(tmp_path / "root")


def generations(store: Path) -> list[int]:
    """Return the sizes of a view's bases in bytes."""
    return [path.stat().st_size for path in store.glob("generations/doc/*/data.mdb")]


def test_a_view_that_moves_to_a_table_leaves_the_node_and_comes_back_with_a_snapshot(
    root: ExportRoot, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    there = remote(VIEW, "elsewhere")
    stores.publish_snapshot(root, VIEW, ROWS)
    stores.load(store, root)
    (loaded,) = generations(store)
    stores.publish_delta(root, there, ROWS[:3])
    stores.publish_delta(root, there, ROWS[3:5])
    assert [entry.rows for entry in stores.load(store, root)] == [0, 0]
    with StoreWriter(store) as writer:
        record = writer.record("doc")
        assert record is not None
        assert (record.applied_seq, record.base.rows, record.overlays, record.view_schema) == (3, 0, (), there)
        with pytest.raises(PushElsewhere, match="'elsewhere'"):
            push_rows(writer, "doc", {"doc_id": [1], "a": [2]})
    assert max(generations(store)) < loaded
    # The view is local again, but has no base for a delta.
    stores.publish_delta(root, VIEW, ROWS[:3])
    with pytest.raises(SchemaChangeRefused, match="--full"):
        stores.load(store, root)
    stores.publish_snapshot(root, VIEW, ROWS[:7])
    stores.load(store, root)
    opened = FeatureStore.open(store)
    assert opened.lookup(["doc:a"], {"doc_id": [0, 6, 7]}).to_pydict() == {"doc:a": [0, 6, None]}
    assert opened.version().troubles == {}


def test_what_a_node_has_of_such_a_view_is_made_again_if_it_is_damaged(root: ExportRoot, tmp_path: Path) -> None:
    stores.publish_snapshot(root, remote(VIEW, "elsewhere"), ROWS)
    stores.load(tmp_path / "store", root)
    for path in (tmp_path / "store").glob("generations/doc/*/data.mdb"):
        path.unlink()
    stores.load(tmp_path / "store", root)
    assert FeatureStore.open(tmp_path / "store").version().view("doc").is_remote


def test_without_a_way_to_ask_for_tables_a_lookup_says_so(
    root: ExportRoot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    stores.publish_snapshot(root, remote(VIEW, "elsewhere"), ROWS)
    stores.load(tmp_path / "store", root)
    opened = FeatureStore.open(tmp_path / "store")
    with pytest.raises(TableFailed, match="credentials"):
        opened.lookup(["doc:a"], {"doc_id": [1]})
    assert opened.lookup(["doc:a"], {"doc_id": [1]}, fetched={}).columns[0].status.tolist() == [Status.UNAVAILABLE]


def test_who_has_no_such_views_imports_nothing_for_them(root: ExportRoot, tmp_path: Path) -> None:
    stores.publish_snapshot(root, VIEW, ROWS)
    stores.load(tmp_path / "store", root)
    program = (
        "import sys; import shoal.engine.server.app, shoal.engine.server.worker; from shoal import FeatureStore; "
        "FeatureStore.open(sys.argv[1]).lookup(['doc:a'], {'doc_id': [1]}); "
        "print([name for name in sys.modules if name.startswith(('boto', 'shoal.engine.dynamodb'))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "store")],
        capture_output=True,
        text=True,
        check=True,
        env={"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
    )
    assert done.stdout.strip() == "[]"


def test_a_table_belongs_to_a_view_that_is_kept_in_one() -> None:
    assert remote(VIEW, "a.b").table_name == "a.b"
    assert ViewSchema.model_validate(VIEW.model_dump() | {"tier": "dynamodb"}).table_name == "shoal.doc"
    for wrong in ({"table": "abc"}, {"tier": "dynamodb", "table": "a b"}, {"tier": "redis"}):
        with pytest.raises(ValueError, match=r"table|tier"):
            ViewSchema.model_validate(VIEW.model_dump() | wrong)
