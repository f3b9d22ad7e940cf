"""The Arrow stream, assembled from cached heads and gathered memory, has the content of pyarrow's own stream."""

import pyarrow as pa
import pytest

from shoal import FeatureStore
from shoal.engine.encoders import arrow_stream
from shoal.engine.root.export_root import ExportRoot
from tests.stores import NOW, load, publish_snapshot, schema

NUMBERS = ["docs:a", "docs:b", "docs:c", "docs:d", "docs:e"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """A store of two views. Documents (`docs`) have numbers of several types, a timestamp and a text; every tenth
    document lacks `d`. Users have two floats; the only user lacks `y`."""
    directory = tmp_path_factory.mktemp("arrow")
    root = ExportRoot(directory / "root")
    docs = schema("docs", a="float32", b="int64", c="int32", d="float64", e="timestamp", text="string")
    rows = [{"docs_id": f"d{i}", "a": i / 3, "b": i, "c": -i, "d": i / 7, "e": NOW, "text": "x"} for i in range(5000)]
    for row in rows[9::10]:
        del row["d"]
    publish_snapshot(root, docs, rows)
    publish_snapshot(root, schema("users", x="float32", y="float32"), [{"users_id": "u", "x": 1.5}])
    load(directory / "store", root)
    return FeatureStore.open(directory / "store")


@pytest.mark.parametrize("keys", [1, 2, 3, 7, 8, 9, 63, 64, 65, 500])
@pytest.mark.parametrize("step", [1, 10], ids=["some null", "none null"])
@pytest.mark.parametrize(
    "features",
    [NUMBERS, NUMBERS[::-1], ["docs:a"], ["users:y", "docs:c", "users:x", "docs:a"], ["docs:a", "docs:text"]],
)
def test_a_stream_reads_back_as_the_answer(store: FeatureStore, keys: int, step: int, features: list[str]) -> None:
    documents = [f"d{number * step}" for number in range(keys)]
    result = store.lookup(features, {"docs_id": documents, "users_id": "u"})
    for _ in range(2):
        batches = list(pa.ipc.open_stream(arrow_stream.encode(result)))
        assert len(batches) == 1
        batches[0].validate(full=True)
        assert batches[0].equals(result.to_arrow())
        counts = [column.null_count for column in batches[0].columns]
        assert counts == [column.nulls for column in result.columns]
