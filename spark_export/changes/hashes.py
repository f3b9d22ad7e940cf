"""The hashes of a row's key and values, and the hash range of a key. Spark computes them in the JVM."""

from collections.abc import Sequence

from pyspark.sql import Column
from pyspark.sql import functions as F

from shoal.engine.format.keys import SECOND_HASH_PREFIX
from shoal.engine.format.schema import Feature, JoinKey
from shoal.spark_export.source.rows import spark_type


def key_hash_columns(join_keys: Sequence[JoinKey]) -> tuple[Column, Column]:
    """Return two bigint columns, the hashes that identify a key, as in `shoal.engine.format.keys.key_identity`."""
    keys = [F.col(key.name) for key in join_keys]
    return F.xxhash64(*keys), F.xxhash64(F.lit(SECOND_HASH_PREFIX), *keys)


def row_hash(features: Sequence[Feature]) -> Column:
    """Return a bigint column: a hash that is equal for two rows with equal values of the given features. NaN equals
    NaN, and -0.0 equals 0.0.

    Spark's xxhash64 ignores nulls and the ends of lists, so nulls and list sizes are hashed in addition to the values.
    """
    columns = [F.col(feature.name) for feature in features]
    lists = [F.col(feature.name) for feature in features if spark_type(feature.type).startswith("array")]
    return F.xxhash64(F.lit(len(columns)), *map(F.isnull, columns), *map(F.array_size, lists), *columns)


def hash_range(key_hash: Column, ranges: int) -> Column:
    """Return an int column: the number of the hash range that contains a hash, floor((hash + 2^63) * ranges / 2^64).
    The hash ranges are `ranges` equal parts of -2^63..2^63.

    The product has more than 64 bits, so it is computed in two halves.
    """
    unsigned = key_hash.bitwiseXOR(F.lit(-(2**63)))
    high = F.shiftrightunsigned(unsigned, 32)
    low = unsigned.bitwiseAND(F.lit(2**32 - 1))
    return F.shiftright(high * ranges + F.shiftright(low * ranges, 32), 32).cast("int")
