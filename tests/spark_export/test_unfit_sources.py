"""A source that does not fit its view: one error names the problem, its place and the fix, and nothing is published."""

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shoal import FeatureStore
from shoal.engine.base.errors import SourceError
from shoal.engine.status.store import describe_version
from tests import stores
from tests.spark_export.lab import KEY, NOW, TIMESTAMP, Lab, Row

FEATURES = {"n": "int64", "emb": "float32[2]", "tags": "list<string>", "raw": "bytes", "title": "string"} | {
    "seen": "timestamp"
}
GOOD: Row = {KEY: "good", TIMESTAMP: NOW, "n": 1, "emb": [0.5, 1.0], "tags": ["a"], "raw": b"x", "title": "t"}
TOO_LONG = 2**24

ROWS: dict[str, tuple[Row, str]] = {
    "null key": ({KEY: None}, "column 'doc_id' of its source is a join key and must not be null"),
    "null event time": ({TIMESTAMP: None}, "column 'event_timestamp' of its source is the event time and must not be"),
    "far event time": (
        {TIMESTAMP: 253402300800000000},
        "must lie in the years 1 to 9999, but 1 row(s) break that, such as the one with event time +10000-01-01",
    ),
    "ancient event time": ({TIMESTAMP: -62135596800000001}, "with event time 0000-12-31"),
    "far time": (
        {"seen": 253402300800000000},
        "column 'seen' of its source must lie in the years 1 to 9999, but 1 row",
    ),
    "ancient time": ({"seen": -62135596800000001}, "doc_id bad, which has 0000-12-31 23:59:59.999999"),
    "event time ahead": (
        {TIMESTAMP: NOW + timedelta(days=1, minutes=30)},
        "unless the view has `future: allow`, but 1 row(s) break that, such as the one with event time 2",
    ),
    "short list": ({"emb": [1.0]}, "must have exactly 2 elements, but 1 row(s) break that, such as the one with"),
    "null in a list": ({"emb": [1.0, None]}, "column 'emb' of its source must not hold null elements"),
    "null in strings": ({"tags": ["a", None]}, "column 'tags' of its source must not hold null elements"),
    "long string": ({"title": "x" * TOO_LONG}, f"'title' of its source must not take more than {TOO_LONG - 1} bytes"),
    "long bytes": ({"raw": b"x" * TOO_LONG}, f"which has {TOO_LONG}; nothing was published"),
    "long strings": ({"tags": ["x" * (TOO_LONG - 8)]}, "column 'tags' of its source must not take more than"),
    "bad text": ({"title": b"a\xff"}, "column 'title' of its source must be UTF-8"),
}

COLUMNS: dict[str, tuple[str, pa.DataType, str]] = {
    "string for int64": ("n", pa.string(), "column 'n' of its source is string, but int64 takes bigint or int"),
    "float for int64": ("n", pa.float64(), "column 'n' of its source is double, but int64 takes"),
    "unsigned": ("n", pa.uint64(), "column 'n' of its source is decimal(20,0), but int64 takes"),
    "doubles for an embedding": ("emb", pa.list_(pa.float64()), "is array<double>, but float32[2] takes array<float>"),
    "number for a key": (KEY, pa.int64(), "column 'doc_id' of its source is bigint, but string takes string"),
    "number for a time": (TIMESTAMP, pa.int64(), "is bigint, but timestamp takes timestamp or timestamp_ntz or date"),
    "nanoseconds": (
        TIMESTAMP,
        pa.timestamp("ns", tz="UTC"),
        "'event_timestamp' of its source is bigint, but timestamp",
    ),
    "string for bytes": ("raw", pa.string(), "column 'raw' of its source is string, but bytes takes binary"),
}

SOURCES: dict[str, tuple[dict[str, Any], str]] = {
    "no such path": ({"path": "nowhere"}, "nowhere) cannot be read: [PATH_NOT_FOUND] Path does not exist"),
    "no such format": ({"path": "source", "format": "nonsense"}, "Failed to find the data source: nonsense"),
    "no package, or no such format": (
        {"path": "source", "format": "nonsense"},
        "nonsense.DefaultSource); correct the format, or name its package: --package GROUP",
    ),
    "no package for Avro": (
        {"path": "source", "format": "avro"},
        "; give --package org.apache.spark:spark-avro_2.13:",
    ),
    "no package for Delta": (
        {"path": "source", "format": "delta"},
        "; give --package io.delta:delta-spark_2.13:VERSION, in the version that goes with Spark 4.",
    ),
    "columns that differ in case alone, of a query": (
        {"sql": "SELECT 'a' AS doc_id, now() AS event_timestamp, 1L AS n, 2L AS N"},
        "has the columns 'n' and 'N'; Spark ignores letter case in column names: rename one, or start",
    ),
    "no such table": (
        {"table": "nowhere.nothing"},
        "(table nowhere.nothing) cannot be read: [TABLE_OR_VIEW",
    ),
    "bad query": ({"sql": "SELEKT 1"}, "(sql SELEKT 1) cannot be read: [PARSE_SYNTAX_ERROR]"),
}


def _refuses(lab: Lab, message: str) -> None:
    before = lab.files()
    with pytest.raises(SourceError, match=re.escape(message)) as raised:
        lab.export()
    assert str(raised.value).startswith("view 'docs': ")
    assert lab.files() == before


@pytest.mark.parametrize("case", ROWS)
def test_a_row_that_cannot_be_published(lab: Lab, case: str) -> None:
    values, message = ROWS[case]
    lab.define(FEATURES)
    bad = GOOD | {KEY: "bad"} | values
    types: dict[str, pa.DataType] = {"emb": pa.list_(pa.float32()), "title": pa.binary()}
    if isinstance(bad[TIMESTAMP], int):
        # No Python datetime can hold this time, so both times are given in microseconds.
        rows = [GOOD | {TIMESTAMP: 0, "title": b"t"}, bad | {"title": b"t"}]
    else:
        rows = [row | {"title": _bytes(row["title"])} for row in (GOOD, bad)]
    lab.put(rows, **types)
    # A file may declare a text column and contain bytes that are not text.
    table = pq.read_table(lab.source / "rows.parquet")
    title = pa.StringArray.from_buffers(len(rows), *table["title"].combine_chunks().buffers()[1:])
    pq.write_table(table.set_column(table.schema.names.index("title"), "title", title), lab.source / "rows.parquet")
    _refuses(lab, message)


def _bytes(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text


def test_event_times_up_to_a_day_ahead_are_published_and_later_ones_where_the_view_says_so(lab: Lab) -> None:
    lab.define({"n": "int64"})
    soon = NOW + timedelta(hours=23)
    far = datetime.max.replace(tzinfo=UTC)
    lab.put([GOOD | {TIMESTAMP: soon}])
    assert lab.export().new == 1
    lab.put([GOOD | {TIMESTAMP: far}, GOOD | {KEY: "other"}])
    before = lab.served()
    _refuses(lab, "column 'event_timestamp' of its source must not be more than a day after the time of the run, 2")
    assert lab.served() == before
    lab.define({"n": "int64"}, future="allow")
    assert lab.export().new == 1
    lab.put([GOOD | {TIMESTAMP: far, "n": 2}, GOOD | {KEY: "other"}])
    assert lab.export().changed == 1
    assert lab.newest().watermark == far
    stores.load(lab.directory / "store", lab.root)
    (view,) = describe_version(FeatureStore.open(lab.directory / "store").version())["views"]
    assert view["freshness_seconds"] == 0


@pytest.mark.parametrize("case", COLUMNS)
def test_a_column_of_a_type_that_does_not_fit(lab: Lab, case: str) -> None:
    column, of, message = COLUMNS[case]
    lab.define(FEATURES)
    lab.put([{name: value for name, value in GOOD.items() if name != column}], **{column: of})
    _refuses(lab, message)


def test_columns_of_files_that_differ_in_case(lab: Lab) -> None:
    lab.define({"n": "int64"})
    lab.put([GOOD | {"N": 1}], N=pa.int64(), n=pa.int64())
    _refuses(lab, "[COLUMN_ALREADY_EXISTS] The column `n` already exists. Choose another name or rename the existing c")
    _refuses(lab, "; Spark ignores letter case in column names: rename one, or start the export by")
    lab.define({"N": "int64"})
    lab.put([GOOD | {"N": 1}])
    lab.define({"n": "int64"})
    _refuses(lab, "has no column 'n'; it has event_timestamp, doc_id, N; did you mean 'N'?")


def test_a_column_that_is_missing(lab: Lab) -> None:
    lab.define({"clicks_7d": "int64"})
    lab.put([GOOD | {"clicks_7d": 1}])
    lab.define({"clicks_7": "int64"})
    _refuses(lab, "has no column 'clicks_7'; it has event_timestamp, doc_id, clicks_7d; did you mean 'clicks_7d'?")


@pytest.mark.parametrize("case", SOURCES)
def test_a_source_that_spark_cannot_read(lab: Lab, case: str) -> None:
    source, message = SOURCES[case]
    lab.define(FEATURES, source=source)
    lab.put([GOOD])
    _refuses(lab, message)


def test_what_was_published_before_stays_when_the_next_run_fails(lab: Lab) -> None:
    lab.define(FEATURES)
    lab.put([GOOD, GOOD | {KEY: "other"}])
    lab.export()
    served = lab.served()
    lab.put([GOOD | {"n": 2}, GOOD | {KEY: "other", "emb": [1.0, 2.0, 3.0]}], emb=pa.list_(pa.float32()))
    _refuses(lab, "doc_id other, which has 3; nothing was published")
    assert lab.served() == served
    lab.put([GOOD | {"n": 2}, GOOD | {KEY: "other"}])
    assert lab.export().changed == 1


def test_a_source_that_changes_while_it_is_read(lab: Lab) -> None:
    lab.define({"n": "int64"}, source={"table": "unsteady"})
    kept = "SELECT 'a' AS doc_id, 1L AS n, timestamp '2026-01-01' AS event_timestamp"
    lab.spark.sql(f"{kept} UNION ALL SELECT 'gone', 2L, now()").createOrReplaceTempView("unsteady")
    lab.export()
    # Every read of this query finds other keys.
    query = f"{kept} UNION ALL SELECT concat(id, ' at ', now()), id, now() FROM range(3)"
    lab.spark.sql(query).createOrReplaceTempView("unsteady")
    _refuses(lab, "(table unsteady) changed during the export: the first read found 4 rows to publish, ")
