"""Make a Feast repository on Redis and load documents into it, through Feast's own interface.

Run this with the Python interpreter of the peers' environment, which has Feast but not Shoal:

    python perf/peers/feast_repo.py REPO --documents FILE.parquet --redis HOST:PORT
"""

import argparse
import sys
from datetime import timedelta
from pathlib import Path

import pyarrow.parquet as pq
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, ValueType
from feast.types import Float32

ROWS_AT_ONCE = 20_000


def main() -> None:
    """Define the feature view and write all documents to the online store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("repo", type=Path)
    parser.add_argument("--documents", type=Path, required=True)
    parser.add_argument("--redis", required=True)
    arguments = parser.parse_args()

    arguments.repo.mkdir(parents=True, exist_ok=True)
    (arguments.repo / "feature_store.yaml").write_text(
        f"project: perf\n"
        f"registry: registry.db\n"
        f"provider: local\n"
        f"online_store:\n  type: redis\n  connection_string: {arguments.redis}\n"
        f"offline_store:\n  type: file\n"
        f"entity_key_serialization_version: 3\n"
    )
    documents = pq.ParquetFile(arguments.documents)
    features = [name for name in documents.schema_arrow.names if name.startswith("f")]
    store = FeatureStore(str(arguments.repo))
    document = Entity(name="doc_id", join_keys=["doc_id"], value_type=ValueType.STRING)
    view = FeatureView(
        name="docs",
        entities=[document],
        ttl=timedelta(0),
        schema=[Field(name=feature, dtype=Float32) for feature in features],
        source=FileSource(path=str(arguments.documents), timestamp_field="event_timestamp"),
    )
    store.apply([document, view])
    written = 0
    for batch in documents.iter_batches(ROWS_AT_ONCE):
        store.write_to_online_store("docs", batch.to_pandas())
        written += batch.num_rows
        sys.stderr.write(f"\rfeast: {written:,} rows")
    sys.stderr.write("\n")


if __name__ == "__main__":
    main()
