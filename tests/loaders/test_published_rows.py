"""Reading published entries: content that contradicts the manifest or the contract is reported, and none of it is
served."""

import os
import re
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from shoal import FeatureStore
from shoal.engine.base.errors import FileDamaged, ManifestInvalid
from shoal.engine.base.times import FIRST_TIME, LAST_TIME, shown_time, to_datetime
from shoal.engine.format.keys import KEY_HASH, KEY_HASH_2
from shoal.engine.kernels.gathering import Status
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.root.manifest import EVENT_TIMESTAMP, TOMBSTONE
from shoal.loaders.segments.published_rows import EntryReader
from tests import stores
from tests.loaders.forgery import delta_table, describe, publish, replaced, snapshot_table

VIEW = stores.schema("doc", a="int64", text="string", vector="float32[2]", words="list<string>")
OTHER = stores.schema("other", a="int64")


def row(number: int, a: int = 0) -> stores.Row:
    return {"doc_id": f"d{number}", "a": a, "text": f"t{number}", "vector": [number, a], "words": [f"w{number}"]}


BASE = [row(number) for number in range(40)]
CHANGED = [row(number, 1) for number in range(0, 40, 2)]


@pytest.fixture
def root(tmp_path: Path) -> ExportRoot:
    root = ExportRoot(tmp_path / "root")
    stores.publish_snapshot(root, VIEW, BASE)
    return root


def values(store: Path) -> dict[str, int | None]:
    keys = [f"d{number}" for number in range(40)]
    found = FeatureStore.open(store).lookup(["doc:a"], {"doc_id": keys}).to_pydict()["doc:a"]
    return dict(zip(keys, found, strict=True))


UNCHANGED = {f"d{number}": 0 for number in range(40)}
APPLIED = {f"d{number}": 1 - number % 2 for number in range(40)}


def check_refused(store: Path, root: ExportRoot, message: str) -> None:
    """Assert that the next entry is rejected with FileDamaged, the previous version stays, and the store reports the
    reason."""
    with pytest.raises(FileDamaged, match=message):
        stores.load(store, root)
    assert values(store) == UNCHANGED
    version = FeatureStore.open(store).version()
    assert version.troubles["doc"].code == "FileDamaged"
    assert version.views["doc"].record.applied_seq == 1


# --- files that differ from the published ones ----------------------------------------------------------------


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def replace_by_another(path: Path) -> None:
    others = [other for other in path.parent.glob("*.parquet") if other != path]
    shutil.copy(others[0], path)


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [cut, halve, empty, lengthen, Path.unlink, replace_by_another, replace_by_directory])
@pytest.mark.parametrize("kind", ["snapshot", "delta"])
def test_a_file_that_is_not_the_one_published_is_refused(
    store: Path, root: ExportRoot, kind: str, damage: Callable[[Path], None]
) -> None:
    if kind == "snapshot":
        manifest = stores.publish_snapshot(root, VIEW, CHANGED)
    else:
        manifest = stores.publish_delta(root, VIEW, CHANGED)
    whole = root.directory(manifest)
    shutil.copytree(whole, whole.with_name("whole"))
    damage(whole / manifest.files[-1].path)
    check_refused(store, root, str(whole))
    shutil.rmtree(whole)
    whole.with_name("whole").rename(whole)
    stores.load(store, root)
    assert FeatureStore.open(store).version().troubles == {}
    assert values(store)["d2"] == 1


@pytest.mark.parametrize("place", [0.1, 0.3, 0.5, 0.7, 0.9, 0.999])
def test_a_turned_bit_anywhere_in_a_file_is_found(store: Path, root: ExportRoot, place: float) -> None:
    manifest = stores.publish_delta(root, VIEW, CHANGED, files=1)
    path = root.directory(manifest) / manifest.files[0].path
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    check_refused(store, root, "part-00000.parquet")


# --- manifests with wrong claims ------------------------------------------------------------------------------


def test_a_manifest_that_lies_of_its_files_is_refused(store: Path, root: ExportRoot) -> None:
    manifest = stores.publish_delta(root, VIEW, CHANGED, files=1)
    (file,) = (file.model_dump() for file in manifest.files)
    lies: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"rows": 19}, {"rows": 19}, "has 20 rows, its manifest says 19"),
        ({"rows": 21}, {"rows": 21}, "has 20 rows, its manifest says 21"),
        ({"bytes": file["bytes"] + 1}, {}, "bytes, its manifest says"),
        ({"checksum": "0" * 16}, {}, "has the checksum"),
        ({"path": "part-00001.parquet"}, {}, "is missing; its manifest lists 20 rows"),
        ({"min_key_hash": file["min_key_hash"] + 1}, {}, "outside the range in its manifest"),
        ({"max_key_hash": file["max_key_hash"] - 1}, {}, "outside the range in its manifest"),
        ({}, {"rows": 19, "tombstones": 1}, "has 0 tombstones, its manifest says 1"),
    ]
    for of_file, of_manifest, message in lies:
        stores.falsify(root, manifest, files=[file | of_file], **of_manifest)
        check_refused(store, root, message)
    stores.falsify(root, manifest)
    stores.load(store, root)
    assert values(store) == APPLIED


def test_ranges_that_overlap_are_refused(store: Path, root: ExportRoot) -> None:
    manifest = stores.publish_delta(root, VIEW, CHANGED, files=2)
    left, right = (file.model_dump() for file in manifest.files)
    for files in ([right, left], [left, right | {"min_key_hash": left["max_key_hash"]}], [left, left]):
        stores.falsify(root, manifest, files=files)
        with pytest.raises(ManifestInvalid, match="overlap in key hash, or are out of order"):
            stores.load(store, root)
    assert values(store) == UNCHANGED
    assert FeatureStore.open(store).version().troubles["doc"].code == "ManifestInvalid"


def test_a_feature_that_the_files_do_not_have_is_refused(store: Path, root: ExportRoot) -> None:
    manifest = stores.publish_delta(root, VIEW, CHANGED)
    content = manifest.view.model_dump(mode="json")
    stores.falsify(root, manifest, view=content | {"features": [*content["features"], {"name": "b", "type": "bool"}]})
    check_refused(store, root, "has no columns 'b', its manifest lists one of type bool")


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("a", pa.array(["x"] * 20)),
        ("a", pa.array([1] * 20, pa.int32())),
        ("text", pa.array([b"x"] * 20)),
        ("text", pa.array(["x"] * 20).dictionary_encode()),
        ("vector", pa.array([[1.0, 2.0]] * 20, pa.list_(pa.float64()))),
        ("words", pa.array([[1]] * 20)),
        ("words", pa.array(["x"] * 20)),
        ("doc_id", pa.array([1] * 20)),
        (EVENT_TIMESTAMP, pa.array([1] * 20)),
        (TOMBSTONE, pa.array([0] * 20)),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value.type),
)
def test_a_column_of_another_type_is_refused(store: Path, root: ExportRoot, name: str, column: pa.Array) -> None:
    table = replaced(delta_table(VIEW, CHANGED), name, column)
    publish(root, VIEW, table, kind="delta", rows=20, tombstones=0, seq=2)
    check_refused(store, root, f"column '{name}' is .*, its manifest says")


def test_a_manifest_in_a_place_not_its_own_is_refused(store: Path, root: ExportRoot) -> None:
    log = root.path / "doc" / "deltas"
    stores.publish_delta(root, VIEW, CHANGED)
    shutil.copytree(log / f"{2:012d}", log / f"{3:012d}")
    with pytest.raises(ManifestInvalid, match="says seq 2, expected 3"):
        stores.load(store, root)
    assert values(store) == APPLIED
    shutil.rmtree(log / f"{3:012d}")
    stores.load(store, root)
    assert FeatureStore.open(store).version().troubles == {}


# --- rows that break the contract -----------------------------------------------------------------------------


def _refuse_table(store: Path, root: ExportRoot, table: pa.Table, message: str, **options: Any) -> None:
    """Assert that a delta with this table is rejected, and remove the delta afterwards."""
    manifest = publish(root, VIEW, table, **options)
    check_refused(store, root, message)
    shutil.rmtree(root.directory(manifest))


def _with_value(column: pa.ChunkedArray, position: int, value: Any) -> pa.Array:
    content = column.to_pylist()
    content[position] = value
    return pa.array(content, column.type)


def test_rows_whose_hashes_are_not_their_keys_are_refused(store: Path, root: ExportRoot) -> None:
    table = delta_table(VIEW, CHANGED)
    for name in (KEY_HASH, KEY_HASH_2):
        wrong = _with_value(table.column(name), 3, table.column(name)[3].as_py() + 1)
        _refuse_table(store, root, replaced(table, name, wrong), "the key hashes of a row do not match its key")
    swapped = replaced(table, "doc_id", _with_value(table.column("doc_id"), 5, "d1"))
    _refuse_table(store, root, swapped, "the key hashes of a row do not match its key")


def test_rows_out_of_order_are_refused(store: Path, root: ExportRoot) -> None:
    table = delta_table(VIEW, CHANGED)
    backwards = table.take(list(range(20))[::-1])
    _refuse_table(store, root, backwards, "not in the order of their hashes")
    _refuse_table(store, root, table.take([0, 2, 1, *range(3, 20)]), "not in the order of their hashes")


def test_row_groups_out_of_order_are_refused(store: Path, root: ExportRoot) -> None:
    table = delta_table(VIEW, CHANGED)
    exchanged = table.take([*range(10, 20), *range(10)])
    _refuse_table(store, root, exchanged, "row group 1 does not begin after the last hash", row_group_size=10)


def test_row_groups_of_a_snapshot_out_of_order_are_refused(store: Path, root: ExportRoot) -> None:
    table = snapshot_table(VIEW, CHANGED)
    publish(root, VIEW, table.take([*range(10, 20), *range(10)]), row_group_size=10)
    check_refused(store, root, "row group 1 does not begin after the last hash")


def test_a_key_that_stands_twice_is_refused(store: Path, root: ExportRoot) -> None:
    table = delta_table(VIEW, CHANGED)
    twice = table.take([0, 1, 1, *range(2, 20)])
    _refuse_table(store, root, twice, "a key occurs twice")
    _refuse_table(store, root, twice, "does not begin after the last hash", row_group_size=2)
    dead_and_alive = delta_table(VIEW, CHANGED, [row(0)])
    _refuse_table(store, root, dead_and_alive, "a key occurs twice")


@pytest.mark.parametrize("name", [KEY_HASH, KEY_HASH_2, EVENT_TIMESTAMP, TOMBSTONE, "doc_id"])
def test_a_null_where_there_must_be_none_is_refused(store: Path, root: ExportRoot, name: str) -> None:
    table = delta_table(VIEW, CHANGED)
    _refuse_table(
        store,
        root,
        replaced(table, name, _with_value(table.column(name), 4, None)),
        f"'{name}' (has nulls|is null in 1)",
    )


@pytest.mark.parametrize("name", [KEY_HASH, KEY_HASH_2, EVENT_TIMESTAMP, TOMBSTONE, "doc_id", "a", "vector"])
def test_a_column_that_is_missing_is_refused(store: Path, root: ExportRoot, name: str) -> None:
    table = delta_table(VIEW, CHANGED)
    manifest = publish(root, VIEW, table)
    path = root.directory(manifest) / manifest.files[0].path
    pq.write_table(table.drop_columns([name]), path)
    stores.falsify(root, manifest, files=[describe(path, table)])
    check_refused(store, root, f"has no columns '{name}'")


def test_a_column_that_stands_twice_is_refused(store: Path, root: ExportRoot) -> None:
    table = delta_table(VIEW, CHANGED)
    _refuse_table(store, root, table.append_column("a", pa.array([5] * 20)), "has 2 columns 'a'")


@pytest.mark.parametrize("vector", [[], [1.0], [1.0, 2.0, 3.0]])
def test_an_embedding_of_another_length_is_refused(store: Path, root: ExportRoot, vector: list[float]) -> None:
    table = delta_table(VIEW, [row(1), row(2) | {"vector": vector}])
    _refuse_table(store, root, table, r"feature 'vector' has a value that does not fit its type float32\[2\]")


@pytest.mark.parametrize(("name", "value"), [("vector", [1.0, None]), ("words", ["a", None])])
def test_a_null_in_a_list_is_refused(store: Path, root: ExportRoot, name: str, value: Any) -> None:
    table = delta_table(VIEW, [row(1), row(2) | {name: value}])
    _refuse_table(store, root, table, "a list feature holds a null item")


def test_text_that_is_no_utf8_is_refused(store: Path, root: ExportRoot) -> None:
    table = delta_table(VIEW, CHANGED)
    for column in ("text", "doc_id"):
        bad = table.column(column).cast(pa.binary()).to_pylist()
        bad[7] = b"\xff\xfe"
        forged = pa.array(bad, pa.binary()).view(pa.string())
        _refuse_table(store, root, replaced(table, column, forged), "Invalid UTF8")


def test_an_instant_finer_than_a_microsecond_is_refused(store: Path, root: ExportRoot) -> None:
    table = delta_table(VIEW, CHANGED)
    instants = pc.add(table.column(EVENT_TIMESTAMP).cast(pa.timestamp("ns", "UTC")), pa.scalar(1, pa.duration("ns")))
    _refuse_table(store, root, replaced(table, EVENT_TIMESTAMP, instants), "would lose data")


@pytest.mark.parametrize("outside", [FIRST_TIME - 1, LAST_TIME + 1, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("column", [EVENT_TIMESTAMP, "at"])
@pytest.mark.parametrize("kind", ["snapshot", "delta"])
def test_a_time_outside_the_years_1_to_9999_is_refused(tmp_path: Path, kind: str, column: str, outside: int) -> None:
    view = stores.schema("doc", at="timestamp")
    root = ExportRoot(tmp_path / "root")
    stores.publish_snapshot(root, view, [{"doc_id": "before"}])
    stores.load(tmp_path / "store", root)
    rows = [{"doc_id": f"d{number}", "at": None if number else stores.NOW} for number in range(5)]
    table = (snapshot_table if kind == "snapshot" else delta_table)(view, rows)
    times = table.column(column).cast(pa.int64()).to_pylist()
    times[3] = outside
    publish(root, view, replaced(table, column, pa.array(times, pa.timestamp("us", "UTC"))))
    key = table.column("doc_id")[3]
    shown = re.escape(shown_time(outside))
    with pytest.raises(FileDamaged, match=f"column '{column}' holds {shown} in row 3 of row group 0 .* doc_id {key}.;"):
        stores.load(tmp_path / "store", root)
    found = FeatureStore.open(tmp_path / "store").lookup(["doc:at"], {"doc_id": ["before", str(key)]})
    assert [Status(status).name for status in found.views["doc"].status] == ["PRESENT", "NOT_FOUND"]


def test_the_first_and_the_last_time_are_taken(tmp_path: Path) -> None:
    view = stores.schema("doc", at="timestamp")
    root = ExportRoot(tmp_path / "root")
    first = to_datetime(FIRST_TIME)
    last = to_datetime(LAST_TIME)
    stores.publish_snapshot(root, view, [{"doc_id": "a", "at": first}, {"doc_id": "b", "at": last}])
    stores.load(tmp_path / "store", root)
    found = FeatureStore.open(tmp_path / "store").lookup(["doc:at"], {"doc_id": ["a", "b"]})
    assert found.to_pydict()["doc:at"] == [first, last]


def test_a_timestamp_without_a_zone_is_refused(store: Path, root: ExportRoot) -> None:
    table = delta_table(VIEW, CHANGED)
    instants = table.column(EVENT_TIMESTAMP).cast(pa.timestamp("us"))
    _refuse_table(store, root, replaced(table, EVENT_TIMESTAMP, instants), "is timestamp.us., its manifest says")


# --- equivalent ways to write the same data -------------------------------------------------------------------


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "+05:30"])
@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
def test_instants_of_any_unit_and_zone_are_taken(store: Path, root: ExportRoot, unit: str, zone: str) -> None:
    table = delta_table(VIEW, CHANGED)
    instants = table.column(EVENT_TIMESTAMP).cast(pa.timestamp(unit, zone))
    publish(root, VIEW, replaced(table, EVENT_TIMESTAMP, instants))
    stores.load(store, root)
    assert values(store) == APPLIED
    found = FeatureStore.open(store).lookup(["doc:a"], {"doc_id": "d0"}).views["doc"]
    assert found.event_timestamps.tolist() == [stores.NOW.replace(tzinfo=None)]


def test_an_embedding_may_be_a_list_of_fixed_size(store: Path, root: ExportRoot) -> None:
    rows = [row(number, 1) | ({"vector": None} if number % 3 else {}) for number in range(0, 40, 2)]
    table = delta_table(VIEW, rows)
    fixed = pa.array(table.column("vector").to_pylist(), pa.list_(pa.float32(), 2))
    publish(root, VIEW, replaced(table, "vector", fixed), row_group_size=7)
    stores.load(store, root)
    found = FeatureStore.open(store).lookup(["doc:vector"], {"doc_id": [row["doc_id"] for row in rows]})
    assert found.to_pydict()["doc:vector"] == [row["vector"] for row in rows]


@pytest.mark.parametrize("row_group_size", [1, 3, 20, 1000])
@pytest.mark.parametrize("use_dictionary", [False, True])
def test_rows_come_in_row_groups_of_any_size(
    store: Path, root: ExportRoot, row_group_size: int, use_dictionary: bool
) -> None:
    table = delta_table(VIEW, CHANGED[:-1], CHANGED[-1:])
    publish(root, VIEW, table, row_group_size=row_group_size, use_dictionary=use_dictionary)
    stores.load(store, root)
    assert values(store) == APPLIED | {"d38": None}


def test_columns_in_another_order_and_columns_of_ones_own_are_taken(store: Path, root: ExportRoot) -> None:
    table = delta_table(VIEW, CHANGED).append_column("mine", pa.nulls(20, pa.date32()))
    publish(root, VIEW, table.select(table.schema.names[::-1]))
    stores.load(store, root)
    assert values(store) == APPLIED


def test_lists_that_are_all_null_or_empty_are_taken(store: Path, root: ExportRoot) -> None:
    rows = [row(number, 1) | {"words": [None, []][number % 4 // 2], "text": None} for number in range(0, 40, 2)]
    stores.publish_delta(root, VIEW, rows)
    stores.load(store, root)
    found = FeatureStore.open(store).lookup(["doc:words", "doc:text"], {"doc_id": [row["doc_id"] for row in rows]})
    assert found.to_pydict()["doc:words"] == [row["words"] for row in rows]
    assert found["doc:text"].nulls == 20


def test_a_file_with_an_empty_row_group_is_taken(store: Path, root: ExportRoot) -> None:
    table = delta_table(VIEW, CHANGED)
    manifest = publish(root, VIEW, table)
    path = root.directory(manifest) / "part-00000.parquet"
    with pq.ParquetWriter(path, table.schema) as writer:
        for part in (table.slice(0, 0), table.slice(0, 5), table.slice(5, 0), table.slice(5), table.slice(0, 0)):
            writer.write_table(part)
    stores.falsify(root, manifest, files=[describe(path, table)])
    stores.load(store, root)
    assert values(store) == APPLIED


def test_a_reader_may_begin_at_any_row_group(root: ExportRoot) -> None:
    manifest = publish(
        root, OTHER, snapshot_table(OTHER, [{"other_id": str(n), "a": n} for n in range(30)]), row_group_size=7
    )
    groups = EntryReader(root, manifest).row_groups()
    assert [group.rows for group in groups] == [7, 7, 7, 7, 2]
    assert all(group.bytes > 0 for group in groups)
    later = EntryReader(root, manifest)
    assert sum(later.read(group).num_rows for group in groups[3:]) == 9
    hashes = np.concatenate([batch.column(KEY_HASH).to_numpy() for _, batch in EntryReader(root, manifest).batches()])
    assert (np.diff(hashes) > 0).all()


def test_event_times_a_day_after_the_publication_are_refused_unless_the_view_allows_them(tmp_path: Path) -> None:
    root = ExportRoot(tmp_path / "root")
    now = datetime.now(UTC)
    view = stores.schema("doc", a="int64")
    rows: list[stores.Row] = [{"doc_id": "in time", "a": 1, stores.TIMESTAMP: now + timedelta(hours=23)}]
    stores.publish_snapshot(root, view, rows)
    stores.load(tmp_path / "store", root)
    rows = [{"doc_id": "poisoned", "a": 1, stores.TIMESTAMP: now + timedelta(days=3650)}]
    bad = stores.publish_delta(root, view, rows)
    with pytest.raises(FileDamaged, match=r"more than a day after its publication.*future: allow"):
        stores.load(tmp_path / "store", root)
    allowed = view.model_copy(update={"future": "allow"}).model_dump(mode="json")
    either: list[dict[str, Any]] = [{"view": allowed}, {"format_version": 1}]
    for number, changes in enumerate(either):
        stores.falsify(root, bad, **changes)
        stores.load(tmp_path / f"store {number}", root)
