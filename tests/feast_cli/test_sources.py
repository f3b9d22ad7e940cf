"""The mapping of Feast's sources to views.yaml.

Stand-ins replace the source classes, because Feast defines them only if their clients are installed.
"""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shoal.spark_export.feast.sources import Columns, UnmappableSource, map_source

WANTED = Columns({"id": "int64", "score": "float32", "at": "timestamp"}, ("id",), "at")


def source(kind: str, **members: Any) -> Any:
    """Return an instance of a new class with this name and the members that every source has."""
    common = {"name": "rows", "field_mapping": {}, "created_timestamp_column": ""}
    return type(kind, (), common | {"file_format": None, "path": None, "table": None, "query": None} | members)()


def mapped(given: Any, *, cast: bool = False) -> dict[str, Any]:
    return map_source(given, WANTED, Path("/repository"), cast=cast)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("data/rows", "/repository/data/rows"),
        ("/data/rows", "/data/rows"),
        ("file:///data/rows", "/data/rows"),
        ("s3://bucket/rows", "s3a://bucket/rows"),
        ("gs://bucket/rows", "gs://bucket/rows"),
    ],
)
def test_files(path: str, expected: str) -> None:
    assert mapped(source("FileSource", path=path)) == {"path": expected, "format": "parquet"}
    delta = type("DeltaFormat", (), {})()
    assert mapped(source("FileSource", path=path, file_format=delta)) == {"path": expected, "format": "delta"}


def test_tables_and_queries_of_spark() -> None:
    assert mapped(source("SparkSource", table="db.rows")) == {"table": "db.rows"}
    assert mapped(source("SparkSource", query="SELECT 1 ; ")) == {"sql": "SELECT 1"}
    files = source("SparkSource", path="s3://b/rows", file_format="json", table_format=None)
    assert mapped(files) == {"path": "s3a://b/rows", "format": "json"}


def test_mapped_columns_make_a_query() -> None:
    given = source("SparkSource", table="db.rows", field_mapping={"the id": "id", "moment": "at"})
    assert mapped(given) == {"sql": "SELECT `the id` AS `id`, `score`, `moment` AS `at` FROM db.rows"}
    assert mapped(given, cast=True)["sql"].startswith("SELECT CAST(`the id` AS BIGINT) AS `id`, CAST(`score` AS FLOAT)")


def test_of_rows_created_twice_the_last_counts() -> None:
    given = source("SparkSource", query="SELECT * FROM t", field_mapping={"i": "id"}, created_timestamp_column="made")
    assert mapped(given) == {
        "sql": "SELECT `i` AS `id`, `score`, `at` FROM (SELECT *, row_number() OVER (PARTITION BY `i` ORDER BY "
        "`at` DESC, `made` DESC) AS __newest FROM (SELECT * FROM t)) WHERE __newest = 1"
    }


def test_files_are_cast_only_where_they_hold_something_else(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    given = source("FileSource", path=str(path))
    times = pa.array([0], pa.timestamp("us"))
    pq.write_table(pa.table({"id": pa.array([1], pa.int32()), "score": pa.array([1], pa.float32()), "at": times}), path)
    assert mapped(given) == {"path": str(path), "format": "parquet"}
    times = pa.array([0], pa.timestamp("ns"))
    pq.write_table(pa.table({"id": [1], "score": [1.0], "at": times}), path)
    assert mapped(given) == {
        "sql": "SELECT `id`, CAST(`score` AS FLOAT) AS `score`, timestamp_micros(`at` DIV 1000) AS `at` "
        f"FROM parquet.`file://{path}`"
    }
    pq.write_table(pa.table({"id": [1], "at": times}), path)
    with pytest.raises(UnmappableSource, match="has no column 'score'; it has id, at"):
        mapped(given)


def test_what_spark_does_not_read_by_itself_is_named() -> None:
    with pytest.raises(UnmappableSource, match=r"'rows' is a BigQuerySource, .* source with table or sql"):
        mapped(source("BigQuerySource", table="project.rows"))
    with pytest.raises(UnmappableSource, match="has a path and no file_format"):
        mapped(source("SparkSource", path="rows", table_format=None))
    with pytest.raises(UnmappableSource, match="relative to the repository, but only the registry is given"):
        map_source(source("FileSource", path="rows"), WANTED, None, cast=False)
