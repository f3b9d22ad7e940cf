"""The hashes of a row, made in the JVM: of its key, of its values, and where the key's hash lies."""

from collections.abc import Sequence

from pyspark.sql import Column
from pyspark.sql import functions as F

from engine.keys import SECOND_HASH_PREFIX
from engine.schema import Feature, JoinKey
from spark_export.source import spark_type


def key_hashes(join_keys: Sequence[JoinKey]) -> tuple[Column, Column]:
    """bigint, bigint: the identity of a key, as `engine.keys.key_identity` has it."""
    keys = [F.col(key.name) for key in join_keys]
    return F.xxhash64(*keys), F.xxhash64(F.lit(SECOND_HASH_PREFIX), *keys)


def row_hash(features: Sequence[Feature]) -> Column:
    """bigint: the same for two rows in which these features have equal values; NaN equals NaN, and -0.0 equals 0.0.

    Spark's xxhash64 passes over nulls and over where a list ends, so both are hashed beside the values.
    """
    columns = [F.col(feature.name) for feature in features]
    lists = [F.col(feature.name) for feature in features if spark_type(feature.type).startswith("array")]
    return F.xxhash64(F.lit(len(columns)), *map(F.isnull, columns), *map(F.array_size, lists), *columns)


def hash_range(key_hash: Column, ranges: int) -> Column:
    """int: which of `ranges` equal parts of -2^63..2^63 a hash lies in, floor((hash + 2^63) * ranges / 2^64).

    The product has more than 64 bits, so it is taken in two halves.
    """
    unsigned = key_hash.bitwiseXOR(F.lit(-(2**63)))
    high, low = F.shiftrightunsigned(unsigned, 32), unsigned.bitwiseAND(F.lit(2**32 - 1))
    return F.shiftright(high * ranges + F.shiftright(low * ranges, 32), 32).cast("int")
