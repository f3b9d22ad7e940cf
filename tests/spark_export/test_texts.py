"""Text values in directory names or files are read as the types that views.yaml declares."""

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from shoal.engine.base.errors import ShoalError, SourceError
from shoal.spark_export.source.partition_texts import read_text
from shoal.spark_export.source.rows import conform, open_source
from shoal.spark_export.source.session import export_session
from shoal.spark_export.source.spark_errors import raised_as
from tests.spark_export.lab import NOW, TIMESTAMP, Lab
from tests.spark_export.test_streams import run

NULL = "__HIVE_DEFAULT_PARTITION__"
TYPES = {
    "n": "int64",
    "small": "int32",
    "x": "float64",
    "y": "float32",
    "flag": "bool",
    "at": "timestamp",
    "s": "string",
}


def put(directory: Path, number: int = 0, **partition: str) -> None:
    """Add a file with one row to the directory of a partition. Letters are not escaped, as in Spark and Hive."""
    for name, text in partition.items():
        directory /= f"{name}={text if text == NULL else re.sub('[%/:=]', _escaped, text)}"
    directory.mkdir(parents=True)
    pq.write_table(
        pa.table({"number": [number], TIMESTAMP: pa.array([NOW], pa.timestamp("us", "UTC"))}), directory / "0"
    )


def _escaped(letter: re.Match[str]) -> str:
    return f"%{ord(letter[0]):02X}"


def refuses(lab: Lab, message: str) -> None:
    with pytest.raises(SourceError, match=re.escape(message)) as raised:
        lab.export()
    assert str(raised.value).startswith("view 'docs': ")
    assert lab.files() == set()


def test_partition_columns_are_read_as_declared(lab: Lab) -> None:
    lab.define(TYPES | {"number": "int64"}, keys={"k": "string", "id": "int64"})
    of_types = {
        "n": "-5",
        "small": "+6",
        "x": "1.50",
        "y": "1e3",
        "flag": "true",
        "at": "2026-01-31",
        "s": "2026-01-31",
    }
    nulls = dict.fromkeys(TYPES, NULL)
    put(lab.source, 1, k="007", id="007", **of_types)
    put(lab.source, 2, k="7", id="7", **nulls)
    put(lab.source, 3, k="a b/c%=ü", id="8", **nulls | {"flag": "FALSE", "x": "-Infinity", "y": "NaN", "s": "1e3"})
    put(
        lab.source,
        4,
        k="0x10",
        id="-9",
        **nulls | {"at": "2026-01-31 12:30:00.5+01:00", "s": " x ", "n": str(2**63 - 1)},
    )
    lab.export()
    rows, _ = lab.published(lab.newest())
    assert set(rows) == {("007", 7), ("7", 7), ("a b/c%=ü", 8), ("0x10", -9)}
    found = {row["number"]: {name: row[name] for name in TYPES} for row in rows.values()}
    day = datetime(2026, 1, 31, tzinfo=UTC)
    none = dict.fromkeys(TYPES)
    assert found[1] == {"n": -5, "small": 6, "x": 1.5, "y": 1000.0, "flag": True, "at": day, "s": "2026-01-31"}
    assert found[2] == none
    assert str(found[3].pop("y")) == "nan"
    assert found[3] == {"n": None, "small": None, "x": float("-inf"), "flag": False, "at": None, "s": "1e3"}
    assert found[4] == none | {"at": day.replace(hour=11, minute=30, microsecond=500_000), "s": " x ", "n": 2**63 - 1}


def test_the_event_time_may_be_a_partition(lab: Lab) -> None:
    lab.define({"number": "int64"}, keys={"k": "int64"}, timestamp_field="day")
    put(lab.source, 1, day="2026-01-30", k="01")
    put(lab.source, 2, day="2026-01-31", k="1")
    lab.export()
    assert {key: row["number"] for key, row in lab.served().items()} == {(1,): 2}
    assert lab.newest().watermark == datetime(2026, 1, 31, tzinfo=UTC)


def read(lab: Lab, features: dict[str, str], source: dict[str, Any], **keys: str) -> list[dict[str, Any]]:
    """Read a source as an export does, without publishing it."""
    lab.define(features, keys=keys, timestamp_field=None, source=source)
    (view,) = lab.views().views
    with raised_as(ShoalError, "?"):
        rows = conform(view, open_source(view, export_session(lab.spark)), 0, view.source).collect()
    return [{name: value for name, value in row.asDict().items() if not name.startswith("__")} for row in rows]


@pytest.mark.parametrize("of", ["csv", "json", "orc"])
def test_partitions_of_other_formats_are_read_as_well(lab: Lab, of: str) -> None:
    row = lab.spark.sql("SELECT '007' AS k, '08' AS id, 5L AS v")
    row.write.partitionBy("k", "id").format(of).options(header=True).save(f"file://{lab.source}")
    options = {"header": True, "inferSchema": True} if of == "csv" else {}
    types = {"v": "int32" if of == "csv" else "int64", "id": "float32"}
    found = read(lab, types, {"path": "source", "format": of, "options": options}, k="string")
    assert found == [{"k": "007", "v": 5, "id": 8.0}]


@pytest.mark.parametrize(
    ("column", "text", "form"),
    [
        ("n", "1e3", "int64: a whole number of 64 bits"),
        ("at", "10:00:00", "timestamp: a date like 2026-01-31 or a time"),
    ],
)
def test_a_partition_that_is_not_of_the_declared_type_is_refused(lab: Lab, column: str, text: str, form: str) -> None:
    lab.define({column: TYPES[column]}, keys={"k": "string"})
    put(lab.source, 1, k="a", **{column: "2026-01-31" if column == "at" else "7"})
    put(lab.source, 2, k="b", **{column: text})
    refuses(
        lab, f"the partition column {column!r} of its source (parquet {lab.source}) has the value '{text}', which is "
    )
    refuses(lab, form)


def test_a_name_that_spark_would_misread_is_refused(lab: Lab) -> None:
    table = pa.table({"k": ["Zürich", "日本"], "n": [1, 2]})
    pq.write_to_dataset(table, lab.source, partition_cols=["k"])
    lab.define({"n": "int64"}, keys={"k": "string"}, timestamp_field=None)
    refuses(lab, "which seems to be percent-encoded UTF-8 misread by Spark")
    query = f"SELECT decode(encode(k, 'ISO-8859-1'), 'UTF-8') AS k, n FROM parquet.`file://{lab.source}`"
    found = read(lab, {"n": "int64"}, {"sql": query}, k="string")
    assert {row["k"]: row["n"] for row in found} == {"Zürich": 1, "日本": 2}


WRONG = {
    "int64": ["x", " 7", "7 ", "7\n", "7.0", "1e3", "0x10", "1_000", "٧", "7L", "9223372036854775808", "true", "+"],
    "int32": ["2147483648", "-2147483649"],
    "float64": ["1d", "0x1p3", "1e999", "-1e999", "1,5", "inf", "nan ", ".", "e3"],
    "float32": ["1f", "1e39"],
    "bool": ["1", "0", "t", "yes", " true", "truer"],
    "timestamp": [
        *("2026", "2026-01", "2026-1-31", "2026-02-30", "10:00", "20260131", "2026-01-31 25:00:00", "2026-01-31 12:00"),
        *("2026-01-31 12:00:00.1234567", "2026-01-31 12:00:00 Europe/Berlin", "12026-01-31"),
    ],
}


def test_what_spark_would_read_in_another_way_is_not_of_the_type(spark: SparkSession) -> None:
    texts = [(of, text) for of, wrong in WRONG.items() for text in wrong]
    value = F.lit(None).cast("string")
    for of in WRONG:
        value = F.when(F.col("of") == of, read_text(F.col("text"), of).cast("string")).otherwise(value)
    rows = (
        export_session(spark)
        .createDataFrame(texts, "of string, text string")
        .select("of", "text", value.alias("value"))
    )
    assert [tuple(row) for row in rows.where("value IS NOT NULL").collect()] == []


def test_texts_of_csv_are_kept_though_spark_takes_them_for_numbers(lab: Lab) -> None:
    lab.source.mkdir()
    (lab.source / "rows.csv").write_text("n,k,s,unused,at\n007,007,1.10,1,2026-01-31\n8,7,1e3,2,2026-01-31\n9,x8,,3,\n")
    source = {"path": "source", "format": "csv", "options": {"header": True, "inferSchema": True}}
    found = read(lab, {"s": "string", "n": "int64", "at": "timestamp"}, source, k="string")
    assert {row["k"]: (row["s"], row["n"]) for row in found} == {"007": ("1.10", 7), "7": ("1e3", 8), "x8": (None, 9)}


def test_texts_of_json_are_kept_though_spark_takes_them_for_numbers_or_times(lab: Lab) -> None:
    lab.source.mkdir()
    (lab.source / "rows.json").write_text(
        '{"k": "2026-01-31T00:00:00Z", "s": 1.50, "n": 1}\n{"k": 12345678901234567890, "n": 2}\n'
    )
    source = {"path": "source", "format": "json", "options": {"inferTimestamp": True}}
    found = read(lab, {"s": "string", "n": "int64"}, source, k="string")
    assert {row["k"]: row["s"] for row in found} == {"2026-01-31T00:00:00Z": "1.50", "12345678901234567890": None}


def test_texts_of_xml_are_kept_though_spark_takes_them_for_numbers(lab: Lab) -> None:
    lab.source.mkdir()
    rows = "<row><k>007</k><s>1.50</s><n>1</n></row><row><k>08</k><n>2</n></row>"
    (lab.source / "rows.xml").write_text(f"<rows>{rows}</rows>")
    source = {"path": "source", "format": "xml", "options": {"rowTag": "row"}}
    found = read(lab, {"s": "string", "n": "int64"}, source, k="string")
    assert {row["k"]: row["s"] for row in found} == {"007": "1.50", "08": None}


def test_a_query_sees_partitions_as_text(lab: Lab) -> None:
    put(lab.source, k="007", n="08")
    query = f"SELECT k, CAST(n AS BIGINT) AS n FROM parquet.`file://{lab.source}`"
    assert read(lab, {"n": "int64"}, {"sql": query}, k="string") == [{"k": "007", "n": 8}]


def test_directories_of_a_stream_are_read_as_declared(lab: Lab) -> None:
    stream = {"format": "parquet", "path": "source", "columns": f"number BIGINT, {TIMESTAMP} TIMESTAMP, given STRING"}
    lab.define({"number": "int64", "n": "int64", "given": "string"}, source=None, keys={"k": "string"}, stream=stream)
    put(lab.source, 1, k="007", n="08", given="009")
    run(lab)
    assert {key: (row["n"], row["given"]) for key, row in lab.served().items()} == {("007",): (8, "009")}
    put(lab.source, 2, k="008", n="8.0", given="1")
    with pytest.raises(
        SourceError, match=r"the partition column 'n' of its source .* has the value '8\.0', which is not int64"
    ):
        run(lab)
