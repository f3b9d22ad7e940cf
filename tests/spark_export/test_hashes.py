"""The JVM computes the same hashes as the reference in plain Python."""

from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from shoal.engine.format.keys import key_identity
from shoal.engine.format.schema import Feature, JoinKey
from shoal.spark_export.changes.hashes import hash_range, key_hash_columns, row_hash

STRINGS = ["", "a", "doc-1", "é", "日本語", "😀" * 9, "x" * 31, "x" * 32, "x" * 33, "y" * 100_000, "nul\0inside"]
INTEGERS = [0, 1, -1, 42, -(2**31), 2**31, 2**63 - 1, -(2**63)]
HASHES = [-(2**63), -(2**63) + 1, -(2**62), -1, 0, 1, 2**62, 2**63 - 1, 6148914691236517205, -3074457345618258603]


def test_a_key_is_the_same_in_the_jvm_and_in_python(spark: SparkSession) -> None:
    pairs = [(text, number) for text in STRINGS for number in INTEGERS]
    text = JoinKey(name="text", type="string")
    number = JoinKey(name="number", type="int64")
    keys = ([text], [number], [text, number], [number, text], [number, number])
    rows = spark.createDataFrame(pairs, "text string, number bigint")
    hashed = rows.select("text", "number", *(column for key in keys for column in key_hash_columns(key))).collect()
    assert len(hashed) == len(pairs)
    for row in hashed:
        for position, key in enumerate(keys):
            found = row[2 + 2 * position], row[3 + 2 * position]
            assert found == key_identity([row[column.name] for column in key])


def test_a_range_is_a_fixed_part_of_the_signed_order(spark: SparkSession) -> None:
    shards = [1, 2, 3, 7, 8, 1000, 4096]
    # The first hash of some ranges, and the last hash of the range before each.
    bounds = {-(-(i << 64) // n) - 2**63 + step for n in (3, 7, 1000) for i in range(1, min(n, 9)) for step in (-1, 0)}
    hashes = sorted({*HASHES, *bounds})
    rows = spark.createDataFrame([(value,) for value in hashes], "hash bigint")
    for row in rows.select("hash", *(hash_range(F.col("hash"), n) for n in shards)).collect():
        assert list(row[1:]) == [((row[0] + 2**63) * n) >> 64 for n in shards]


def test_rows_hash_alike_only_if_their_values_are_equal(spark: SparkSession) -> None:
    ddl = "n int, a bigint, b bigint, x double, s string, t string, l array<bigint>, m array<bigint>, f array<float>"
    nothing = (None,) * 9
    distinct = [
        nothing,
        (None, 1, None, *nothing[3:]),
        (None, None, 1, *nothing[3:]),
        (None, 0, None, *nothing[3:]),
        (*nothing[:4], "ab", "c", None, None, None),
        (*nothing[:4], "a", "bc", None, None, None),
        (*nothing[:4], "", None, None, None, None),
        (*nothing[:4], None, "", None, None, None),
        (*nothing[:6], [], None, None),
        (*nothing[:6], None, [], None),
        (*nothing[:6], [1, 2], [3], None),
        (*nothing[:6], [1], [2, 3], None),
        (*nothing[:6], [1, 2, 3], [], None),
        (*nothing[:3], 0.0, *nothing[4:]),
        (*nothing[:3], float("nan"), *nothing[4:]),
        (*nothing[:8], [0.0]),
        (*nothing[:8], [float("nan")]),
    ]
    negative_zero = [(*nothing[:3], -0.0, *nothing[4:]), (*nothing[:8], [-0.0])]
    types = {"n": "int32", "x": "float64", "s": "string", "t": "string", "f": "list<float32>"}
    types |= {"a": "int64", "b": "int64", "l": "list<int64>", "m": "list<int64>"}
    features = [Feature(name=name.split()[0], type=types[name.split()[0]]) for name in ddl.split(", ")]
    rows = spark.createDataFrame([*distinct, *negative_zero], ddl)
    hashes = [row[0] for row in rows.select(row_hash(features)).collect()]
    assert len(set(hashes[: len(distinct)])) == len(distinct)
    assert hashes[-2:] == [hashes[13], hashes[15]]
