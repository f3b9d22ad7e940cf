"""Lookups of a view in a table give the same results as lookups of a local view, cell by cell: every type, null, age
and status."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal import FeatureStore
from shoal.engine.base.errors import TableMissing
from shoal.engine.format.schema import ViewSchema
from shoal.engine.root.export_root import ExportRoot
from shoal.loaders.backup.verify import verify_store
from tests import every_type, stores
from tests.dynamodb.tables import bring_local, items, remote, sync

NAMES = [row["items_id"] for row in every_type.item_rows(300)]
ABSENT = ["nobody", "item-100000"]


def renamed(view: ViewSchema, name: str) -> ViewSchema:
    """Return the same view under another name, with unchanged join keys."""
    return view.model_copy(update={"name": name})


@pytest.fixture
def root(tmp_path: Path, table: str) -> ExportRoot:
    """A root with every view twice: on the node, and, with an x after its name, in a table."""
    root = ExportRoot(tmp_path / "root")
    for view, rows in (
        (every_type.ITEMS, every_type.item_rows(300)),
        (every_type.PAIRS, every_type.pair_rows()),
        (every_type.RECENT, every_type.recent_rows()),
    ):
        stores.publish_snapshot(root, view, rows)
        stores.publish_snapshot(root, remote(renamed(view, f"{view.name}x"), f"{table}.{view.name}"), rows)
    return root


def test_lookups_from_tables_are_those_of_the_node(root: ExportRoot, store: Path, table: str) -> None:
    written = sync(root)
    assert {entry.view: entry.puts for entry in written} == {"itemsx": len(NAMES), "pairsx": 16, "recentx": 3}
    opened = FeatureStore.open(store)
    requests: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("items", {"items_id": [*NAMES, *ABSENT, NAMES[0]]}, {}),
        ("pairs", {"users_id": [0, 1, 2, 9], "items_id": ["item-0", "item-3", "none", "item-1"]}, {}),
        ("recent", {"recent_id": ["fresh", "stale", "stale-null", "none"]}, {}),
        ("recent", {"recent_id": ["fresh", "stale", "stale-null", "none"]}, {"stale": "serve"}),
        ("recent", {"recent_id": ["fresh", "stale", "none"]}, {"max_age": timedelta(days=9)}),
    ]
    for view, keys, how in requests:
        local = opened.lookup([f"{view}:*"], keys, **how)
        found = opened.lookup([f"{view}x:*"], keys, **how)
        assert found.partial == []
        for one, other in zip(local.columns, found.columns, strict=True):
            assert one.status.tolist() == other.status.tolist(), one.reference
            assert one.rows.event_time.tolist() == other.rows.event_time.tolist()
            assert one.to_arrow().equals(other.to_arrow()) or repr(one.to_pylist()) == repr(other.to_pylist())
        counts = zip(local.value_counts.values(), found.value_counts.values(), strict=True)
        assert all(one.tolist() == other.tolist() for one, other in counts)
    numbers = ["flag", "small", "large", "single", "double", "at", "vector"]
    wanted = {"items_id": [*NAMES, *ABSENT]}
    first, mixed = (
        opened.lookup_matrix([f"items{x}:{name}" for x, name in zip(pattern, numbers, strict=True)], wanted).matrix
        for pattern in ([""] * 7, ["", "x", "", "x", "x", "", "x"])
    )
    np.testing.assert_array_equal(first, mixed)


def test_rows_of_earlier_schemas_are_read_under_the_newest(tmp_path: Path, table: str) -> None:
    """One feature was added, one was removed, and one was widened."""
    root = ExportRoot(tmp_path / "root")
    old = stores.schema("doc", key="int64", a="int32", text="string", gone="float32")
    new = stores.schema("doc", key="int64", more="string", a="int64", text="string")
    stores.publish_snapshot(root, remote(old, table), [{"doc_id": n, "a": n, "text": f"t{n}"} for n in range(20)])
    stores.publish_delta(root, remote(new, table), [{"doc_id": n, "a": 2**40 + n, "more": "m"} for n in range(5, 9)])
    sync(root)
    stores.load(tmp_path / "store", root)
    opened = FeatureStore.open(tmp_path / "store")
    expected = [2**40 + n if 5 <= n < 9 else n for n in range(20)]
    for _ in range(2):
        found = opened.lookup(["doc:*"], {"doc_id": list(range(20))}).to_pydict()
        assert found["doc:a"] == expected
        assert found["doc:more"] == ["m" if 5 <= n < 9 else None for n in range(20)]
        assert found["doc:text"] == [None if 5 <= n < 9 else f"t{n}" for n in range(20)]
    matrix = opened.lookup_matrix(["doc:a"], {"doc_id": list(range(20))}).matrix
    assert matrix[:, 0].tolist() == expected
    # Rows that were brought to a node also have the newest schema.
    bring_local(tmp_path / "local", table)
    local = FeatureStore.open(tmp_path / "local").lookup(["doc:*"], {"doc_id": list(range(20))}).to_pydict()
    assert local == found


def test_a_table_becomes_the_base_of_its_view_which_goes_on_along_the_log(
    tmp_path: Path, root: ExportRoot, store: Path, table: str
) -> None:
    sync(root)
    for view in ("items", "pairs"):
        bring_local(tmp_path / "local", f"{table}.{view}")
    opened = FeatureStore.open(tmp_path / "local")
    expected = FeatureStore.open(store)
    assert not opened.version().has_remote_views
    keys = {"items_id": [*NAMES, *ABSENT]}
    assert repr(opened.lookup(["itemsx:*"], keys).to_pydict()).replace("itemsx", "items") == repr(
        expected.lookup(["items:*"], keys).to_pydict()
    )
    checks = list(verify_store(tmp_path / "local"))
    assert len(checks) >= 2
    assert [check for check in checks if check.problem] == []
    record = opened.version().view("itemsx").record
    assert (record.applied_seq, record.applied_entry) == (1, root.entry("itemsx", 1).id)
    assert len(items(f"{table}.items")) == len(NAMES)
    with pytest.raises(TableMissing, match="has no table 'nothing-there'"):
        bring_local(tmp_path / "another", "nothing-there")
