"""The content of an entry: types, order, hash ranges, and the manifest."""

import itertools
import math
from datetime import UTC, date, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shoal.engine.format.keys import KEY_HASH, KEY_HASH_2
from shoal.engine.format.schema import SCALAR_TYPES
from shoal.engine.root.manifest import EVENT_TIMESTAMP, TOMBSTONE
from tests.spark_export.lab import KEY, NOW, TIMESTAMP, VIEW, Lab, Row, ago, plain

EVERY_TYPE = {f"of_{name.strip('>').replace('<', '_')}": name for name in SCALAR_TYPES} | {"emb": "float32[3]"}
VALUES: list[Row] = [
    {},
    {
        "of_bool": True,
        "of_int32": -(2**31),
        "of_int64": 2**63 - 1,
        "of_float32": 0.5,
        "of_float64": math.pi,
        "of_string": "ä€😀",
        "of_bytes": b"\x00\xff",
        "of_timestamp": datetime(1850, 1, 2, 3, 4, 5, 678901, tzinfo=UTC),
        "of_list_int64": [1, -2],
        "of_list_float32": [0.25, float("inf")],
        "of_list_string": ["", "b", "ä"],
        "emb": [1.0, 2.0, 3.0],
    },
    {
        "of_bool": False,
        "of_int32": 0,
        "of_int64": 0,
        "of_float32": float("nan"),
        "of_float64": float("-inf"),
        "of_string": "",
        "of_bytes": b"",
        "of_timestamp": datetime(9999, 12, 31, tzinfo=UTC),
        "of_list_int64": [],
        "of_list_float32": [],
        "of_list_string": [],
        "emb": [float("nan"), -0.0, 2.0**-149],
    },
]


def test_every_type_arrives_as_it_was(lab: Lab) -> None:
    lab.define(EVERY_TYPE)
    rows = [{KEY: f"d{i}", TIMESTAMP: ago(hours=i)} | values for i, values in enumerate(VALUES)]
    lab.put(rows)
    lab.export()
    manifest = lab.newest()
    as_float_lists = EVERY_TYPE | {"emb": "list<float32>"}
    types = {name: SCALAR_TYPES[of] for name, of in as_float_lists.items()}
    expected = {KEY_HASH: pa.int64(), KEY_HASH_2: pa.int64(), EVENT_TIMESTAMP: SCALAR_TYPES["timestamp"]}
    expected |= {KEY: pa.string()} | types
    schema = lab.table(manifest).schema
    assert schema.names == list(expected)
    for name, of in expected.items():
        found = schema.field(name).type
        assert found.value_type == of.value_type if pa.types.is_list(of) else found == of
    served = lab.served()
    for row in rows:
        found_row = served[(str(row[KEY]),)]
        assert found_row[EVENT_TIMESTAMP] == row[TIMESTAMP]
        assert {name: plain(found_row[name]) for name in EVERY_TYPE} == {
            name: plain(row.get(name)) for name in EVERY_TYPE
        }

    # A second export finds no change. A delta has the same columns, plus the tombstone column.
    assert lab.export().kind is None
    lab.put([*rows[1:], rows[1] | {KEY: "d9"}])
    assert lab.export().kind == "delta"
    names = list(expected)
    assert lab.table(lab.newest()).schema.names == [*names[:3], TOMBSTONE, *names[3:]]


def test_narrower_types_are_widened(lab: Lab) -> None:
    features = {"small": "int32", "wide": "int64", "double": "float64", "day": "timestamp", "naive": "timestamp"}
    lab.define(features | {"list": "list<int64>"}, keys={"a": "int64", "b": "string"})
    narrow = {"a": pa.int16(), "small": pa.int8(), "wide": pa.int32(), "double": pa.float32(), "day": pa.date32()}
    values = {"small": -8, "wide": 7, "double": 0.5, "day": date(2024, 2, 29), "naive": datetime(2024, 1, 1, 12)}
    row: Row = {"a": -3, "b": "k", TIMESTAMP: date(2025, 1, 1), "list": [1, 2]} | values
    types = {"naive": pa.timestamp("us"), "list": pa.list_(pa.int32()), TIMESTAMP: pa.date32()}
    lab.put([row], **(narrow | types))
    lab.export()
    served = lab.served()[(-3, "k")]
    assert served == {
        "a": -3,
        "b": "k",
        EVENT_TIMESTAMP: datetime(2025, 1, 1, tzinfo=UTC),
        "small": -8,
        "wide": 7,
        "double": 0.5,
        "day": datetime(2024, 2, 29, tzinfo=UTC),
        "naive": datetime(2024, 1, 1, 12, tzinfo=UTC),
        "list": [1, 2],
    }
    assert lab.table(lab.newest()).schema.field("small").type == pa.int32()


def test_files_are_ranges_of_the_hash_and_sorted(lab: Lab) -> None:
    lab.define({"n": "int64"}, keys={"id": "int64"}, shards=7)
    lab.put([{"id": i, "n": i, TIMESTAMP: NOW} for i in range(300)])
    report = lab.export()
    manifest = lab.newest()
    assert len(manifest.files) == 7
    for number, file in enumerate(manifest.files):
        table = pq.read_table(lab.root.checked_file(manifest, file))
        hashes = list(zip(table[KEY_HASH].to_pylist(), table[KEY_HASH_2].to_pylist(), strict=True))
        assert hashes == sorted(hashes)
        assert (file.min_key_hash, file.max_key_hash) == (hashes[0][0], hashes[-1][0])
        assert {((first + 2**63) * 7) >> 64 for first, _ in hashes} == {number}
        assert file.rows == len(hashes)
    assert report.bytes == sum(file.bytes for file in manifest.files)
    for left, right in itertools.pairwise(manifest.files):
        assert left.max_key_hash < right.min_key_hash


def test_a_manifest_says_where_its_rows_come_from(lab: Lab) -> None:
    lab.define({"n": "int64"})
    lab.put([{KEY: "a", "n": 1, TIMESTAMP: ago(hours=1)}, {KEY: "b", "n": 1, TIMESTAMP: ago(hours=3)}])
    lab.export()
    first = lab.newest()
    assert (first.kind, first.seq, first.parent, first.rows, first.tombstones) == ("snapshot", 1, None, 2, 0)
    assert first.watermark == ago(hours=1)
    assert first.inputs == (f"parquet {lab.source}", "1 file", f"file://{lab.source}/rows.parquet")
    assert first.job.startswith(lab.spark.sparkContext.applicationId)
    assert lab.root.newest_snapshot(VIEW) == first

    # The source loses its newest row, but the watermark keeps the newest event time ever seen.
    lab.put([{KEY: "b", "n": 2, TIMESTAMP: ago(hours=2)}])
    lab.export()
    second = lab.newest()
    assert (second.kind, second.seq, second.parent, second.rows, second.tombstones) == ("delta", 2, first.id, 1, 1)
    assert second.watermark == ago(hours=1)
    assert second.published_at > first.published_at


@pytest.mark.parametrize("name", ["[1]{a,b}*?\\x", "day:1 %20#z"])
def test_a_source_is_read_from_the_path_as_it_is_written(lab: Lab, name: str) -> None:
    lab.define({"n": "int64"}, source={"path": f"{name}/part"})
    lab.source = lab.directory / name / "part"
    lab.source.parent.mkdir()
    lab.put([{KEY: "a", "n": 1, TIMESTAMP: ago(hours=1)}])
    # Read as a pattern, this name would match another source.
    (lab.directory / "1axyx").mkdir()
    (lab.directory / "1axyx" / "part").write_text("another source")
    lab.export()
    assert [row["n"] for row in lab.served().values()] == [1]


def test_a_path_of_which_there_is_none_is_a_pattern(lab: Lab) -> None:
    lab.define({"n": "int64"}, source={"path": "sour[a-c]e*"})
    lab.put([{KEY: "a", "n": 1, TIMESTAMP: ago(hours=1)}])
    assert lab.export().new == 1


def test_other_formats_are_read_with_their_options(lab: Lab) -> None:
    source = {"path": "rows.csv", "format": "csv", "options": {"header": True, "inferSchema": True, "sep": ";"}}
    lab.define({"n": "int64", "title": "string"}, source=source)
    (lab.directory / "rows.csv").write_text(
        "doc_id;event_timestamp;n;title\na;2024-05-06T07:08:09Z;5;x,y\nb;2024-05-06;;\n"
    )
    lab.export()
    assert list(lab.served().values()) == [
        {KEY: "a", EVENT_TIMESTAMP: datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC), "n": 5, "title": "x,y"},
        {KEY: "b", EVENT_TIMESTAMP: datetime(2024, 5, 6, tzinfo=UTC), "n": None, "title": None},
    ]
