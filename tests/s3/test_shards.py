"""A shard of a root in S3 does not fetch the files of other shards."""

from pathlib import Path

from shoal import FeatureStore
from shoal.engine.base.shards import Shard
from shoal.engine.format.keys import key_identity
from shoal.engine.root.export_root import ExportRoot
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.follow.load import load
from tests import stores
from tests.faulty_network import FaultyNetwork
from tests.s3.mirroring import mirror

DOC = stores.schema("doc", key="int64", a="int64")
ROWS: list[stores.Row] = [{"doc_id": number, "a": number} for number in range(1000)]


def test_files_of_other_shards_are_not_fetched(tmp_path: Path, remote: ExportRoot, network: FaultyNetwork) -> None:
    local = ExportRoot(tmp_path / "root")
    shard = Shard(2, 4)
    manifest = stores.publish_snapshot(local, DOC, ROWS, files=9)
    mirror(local, remote)
    with StoreWriter(tmp_path / "store", shard=shard) as writer:
        load(writer, remote, stores.NullObserver())
    inside = [key for key in range(1000) if shard.of_hash(key_identity([key])[0]) == shard]
    answer = FeatureStore.open(tmp_path / "store").lookup(["doc:a"], {"doc_id": inside})
    assert answer.to_pydict()["doc:a"] == inside
    touched = {file.path for file in manifest.files if shard.touches(file.min_key_hash, file.max_key_hash)}
    fetched = {
        request.rpartition("/")[2].partition("?")[0] for request in network.requests if request.startswith("GET ")
    }
    assert 0 < len(touched) < 5
    assert {name for name in fetched if name.endswith(".parquet")} == touched
