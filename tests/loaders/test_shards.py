"""A store that is a shard reads, stores, accepts and serves only its own rows, and rejects all others with an error."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from shoal import FeatureStore
from shoal.engine.base.errors import FileDamaged, KeyOutsideShard, StoreIsOtherShard
from shoal.engine.base.shards import Shard
from shoal.engine.format.keys import key_identity
from shoal.engine.format.paths import generation_path
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.status.store import describe_version
from shoal.loaders.apply.compaction import fold
from shoal.loaders.apply.entries import build_base
from shoal.loaders.backup.verify import verify
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.follow.load import load
from shoal.loaders.follow.reload import ReloadOrder, reload_view
from shoal.loaders.push.push import push_rows
from shoal.loaders.segments import generation
from tests import stores

VIEW = stores.schema("doc", key="int64", a="int64", text="string")
ROWS: list[stores.Row] = [{"doc_id": number, "a": number, "text": f"text {number}"} for number in range(2000)]
SHARDS = [Shard(number, 3) for number in (1, 2, 3)]


def keys_of(shard: Shard, rows: Sequence[stores.Row] = ROWS) -> list[int]:
    return [row["doc_id"] for row in rows if shard.of_hash(key_identity([row["doc_id"]])[0]) == shard]


def load_shard(store: Path, root: ExportRoot, shard: Shard | None) -> list[int]:
    """Load as a shard and return the number of rows and tombstones of each applied entry."""
    with StoreWriter(store, shard=shard) as writer:
        return [applied.rows + applied.tombstones for applied in load(writer, root, stores.NullObserver())]


@pytest.fixture
def root(tmp_path: Path) -> ExportRoot:
    root = ExportRoot(tmp_path / "root")
    stores.publish_snapshot(root, VIEW, ROWS, files=7)
    return root


def check_holds(store: Path, shard: Shard, expected: dict[int, int | None]) -> None:
    """Assert the values that a store returns for the keys of a shard; None stands for a missing row."""
    opened = FeatureStore.open(store)
    keys = keys_of(shard)
    answer = opened.lookup(["doc:a", "doc:text"], {"doc_id": keys})
    assert answer.to_pydict()["doc:a"] == [expected.get(key, key) for key in keys]
    assert np.array_equal(
        opened.lookup_matrix(["doc:a"], {"doc_id": keys}).matrix[:, 0],
        np.array([expected.get(key, key) for key in keys], float),
        equal_nan=True,
    )
    assert [checked for checked in verify(store) if checked.problem] == []


def test_shards_hold_all_rows_between_them_and_refuse_those_of_others(tmp_path: Path, root: ExportRoot) -> None:
    changed = [{"doc_id": key, "a": -1, "text": None} for key in range(300)]
    stores.publish_delta(root, VIEW, changed, [{"doc_id": key} for key in range(500, 600)], files=5)
    expected: dict[int, int | None] = dict.fromkeys(range(300), -1) | dict.fromkeys(range(500, 600))
    held = []
    for shard in SHARDS:
        store = tmp_path / f"store-{shard.number}"
        held.append(load_shard(store, root, shard))
        check_holds(store, shard, expected)
        opened = FeatureStore.open(store)
        inside = keys_of(shard)
        outside = [key for key in range(2000) if key not in set(inside)][:3]
        for look_up in (opened.lookup, opened.lookup_matrix):
            with pytest.raises(
                KeyOutsideShard, match=rf"3 of 4 keys of view 'doc' .* is shard {shard}: the key in row 1"
            ):
                look_up(["doc:a"], {"doc_id": [inside[0], *outside]})
        assert opened.lookup(["doc:a"], {"doc_id": []}).keys == 0
        assert describe_version(opened.version())["shard"] == f"{shard.number}/3"
    assert [sum(rows) for rows in zip(*held, strict=True)] == [2000, 400]


def test_files_of_other_shards_are_not_read(tmp_path: Path, root: ExportRoot) -> None:
    delta = stores.publish_delta(root, VIEW, [row | {"a": -2} for row in ROWS[:500]], files=6)
    shard = SHARDS[1]
    removed = 0
    for manifest in (root.entry("doc", 1), delta):
        for file in manifest.files:
            if not shard.touches(file.min_key_hash, file.max_key_hash):
                (root.directory(manifest) / file.path).unlink()
                removed += 1
    assert removed >= 6
    load_shard(tmp_path / "store", root, shard)
    check_holds(tmp_path / "store", shard, dict.fromkeys(range(500), -2))
    # As in every load, the files that the shard needs are fully verified.
    straddling = next(
        file for file in root.entry("doc", 1).files if file.min_key_hash < shard.first <= file.max_key_hash
    )
    path = root.directory(root.entry("doc", 1)) / straddling.path
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(FileDamaged, match=straddling.path):
        load_shard(tmp_path / "other", root, shard)


def test_a_build_of_a_shard_that_is_cut_off_goes_on(
    tmp_path: Path, root: ExportRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "CHUNK_BYTES", 4 << 10)
    shard = SHARDS[1]
    counted = [0]

    def until_half(rows: int) -> None:
        counted[0] += rows
        if counted[0] > len(keys_of(shard)) // 2:
            raise InterruptedError

    with StoreWriter(tmp_path / "store", shard=shard) as writer:
        with pytest.raises(InterruptedError):
            build_base(writer, root, root.entry("doc", 1), until_half)
        steps: list[int] = []
        build_base(writer, root, root.entry("doc", 1), steps.append)
        assert steps[0] > 0
        assert sum(steps) == len(keys_of(shard))
        load(writer, root, stores.NullObserver())
    check_holds(tmp_path / "store", shard, {})


def test_a_store_stays_the_shard_that_it_is(tmp_path: Path, root: ExportRoot) -> None:
    load_shard(tmp_path / "store", root, SHARDS[0])
    load_shard(tmp_path / "store", root, SHARDS[0])
    load_shard(tmp_path / "store", root, None)
    check_holds(tmp_path / "store", SHARDS[0], {})
    with pytest.raises(StoreIsOtherShard, match=r"holds shard 1/3, and cannot become shard 2/3"):
        StoreWriter(tmp_path / "store", shard=SHARDS[1])
    load_shard(tmp_path / "whole", root, None)
    with pytest.raises(StoreIsOtherShard, match=r"holds all rows, and cannot become shard 2/3"):
        StoreWriter(tmp_path / "whole", shard=SHARDS[1])


def test_pushes_folds_and_going_back_keep_to_the_shard(tmp_path: Path, root: ExportRoot) -> None:
    store = tmp_path / "store"
    shard = SHARDS[2]
    inside = keys_of(shard)
    outside = keys_of(SHARDS[0])[:2]
    with StoreWriter(store, shard=shard) as writer:
        load(writer, root, stores.NullObserver())
        before = writer.version().id
        with pytest.raises(KeyOutsideShard, match=r"2 of 3 keys .* belongs to shard 1/3"):
            push_rows(writer, "doc", {"doc_id": [inside[0], *outside], "a": [5, 5, 5]})
        with pytest.raises(KeyOutsideShard):
            push_rows(writer, "doc", {"doc_id": inside[:1], "a": [5]}, deletes={"doc_id": outside})
        assert writer.version().id == before
        push_rows(writer, "doc", {"doc_id": inside[:1], "a": [5]}, deletes={"doc_id": inside[1:2]})
        pushed: dict[int, int | None] = {inside[0]: 5, inside[1]: None}
        check_holds(store, shard, pushed)
        fold(writer, "doc")
        check_holds(store, shard, pushed)
        first = root.entry("doc", 1).snapshot_id
        stores.publish_snapshot(root, VIEW, [row | {"a": 9} for row in ROWS])
        load(writer, root, stores.NullObserver())
        nine: dict[int, int | None] = dict.fromkeys(range(2000), 9)
        check_holds(store, shard, nine | pushed)
        kept = [base.id for base in writer.version().view("doc").record.kept]
        reload_view(writer, root, "doc", ReloadOrder(view="doc", snapshot=kept[0]), stores.NullObserver())
        assert first != kept[0]
        check_holds(store, shard, pushed)


def test_a_damaged_shard_is_loaded_again_as_what_it_is(tmp_path: Path, root: ExportRoot) -> None:
    store = tmp_path / "store"
    shard = SHARDS[1]
    load_shard(store, root, shard)
    data = generation_path(store, "doc", root.entry("doc", 1).snapshot_id) / "data.mdb"
    data.unlink()
    assert load_shard(store, root, None) == [len(keys_of(shard))]
    check_holds(store, shard, {})
