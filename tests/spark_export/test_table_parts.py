"""The encoding of a table's rows in files, read from the files' own metadata."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shoal.engine.format.keys import KEY_HASH, KEY_HASH_2
from shoal.engine.format.schema import arrow_type
from shoal.engine.root.manifest import EVENT_TIMESTAMP, TOMBSTONE
from shoal.spark_export.publication import s3_tasks
from shoal.spark_export.publication.table_parts import write_part

ROWS = 20_000
WITH_DICTIONARY = {"word", "words.list.element"}


def table(rows: int = ROWS) -> pa.Table:
    """Return rows as a stream produces them, with a feature of every type."""
    random = np.random.default_rng(1)
    words = [f"word {number % 50}" for number in range(rows)]
    floats = random.random(8 * rows, np.float32)
    of = {
        KEY_HASH: np.sort(random.integers(-(2**63), 2**63 - 1, rows)),
        KEY_HASH_2: random.integers(-(2**63), 2**63 - 1, rows),
        EVENT_TIMESTAMP: pa.array(random.integers(0, 2**50, rows), pa.timestamp("us", "UTC")),
        TOMBSTONE: random.random(rows) < 0.1,
        "id": random.permutation(rows),
        "float": random.random(rows, np.float32),
        "double": random.random(rows),
        "small": random.integers(0, 5, rows, np.int32),
        "word": words,
        "raw": pa.array([random.bytes(16) for _ in range(rows)], arrow_type("bytes")),
        "embedding": pa.ListArray.from_arrays(np.arange(0, 8 * rows + 1, 8).astype(np.int32), floats),
        "numbers": pa.array([[number, 7] for number in range(rows)], arrow_type("list<int64>")),
        "words": pa.array([[word, "same"] for word in words], arrow_type("list<string>")),
    }
    return pa.table(of)


def by_stream(rows: pa.Table, path: Path) -> None:
    write_part(rows, path)


def by_task(rows: pa.Table, path: Path) -> None:
    with s3_tasks._as_parquet(rows.to_batches(max_chunksize=5000)) as stream:
        stream.seek(0)
        path.write_bytes(stream.read())


@pytest.mark.parametrize("write", [by_stream, by_task])
def test_strings_alone_have_a_dictionary(tmp_path: Path, write: Callable[[pa.Table, Path], None]) -> None:
    rows = table()
    write(rows, tmp_path / "part.parquet")
    metadata = pq.read_metadata(tmp_path / "part.parquet")
    found = set()
    for group in range(metadata.num_row_groups):
        for column in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(column)
            assert chunk.compression == "ZSTD"
            if chunk.has_dictionary_page or any("DICTIONARY" in encoding for encoding in chunk.encodings):
                found.add(chunk.path_in_schema)
    assert found == WITH_DICTIONARY
    assert pq.read_table(tmp_path / "part.parquet").equals(rows)


def test_a_table_without_strings_has_no_dictionary(tmp_path: Path) -> None:
    write_part(table(10).drop_columns(["word", "words"]), tmp_path / "part.parquet")
    group = pq.read_metadata(tmp_path / "part.parquet").row_group(0)
    assert not any(group.column(number).has_dictionary_page for number in range(group.num_columns))
