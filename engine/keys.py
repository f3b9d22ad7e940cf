"""Key identity: 128 bits by which a row is known in Spark, in Python and in the kernels.

The first hash is Spark's `xxhash64(key…)`: XXH64 chained over the columns from seed 42, a string as its UTF-8
bytes, an integer as 8 little-endian bytes. The second is `xxhash64('shoal', key…)`. Both are kept as signed 64-bit
integers, the form and the order that Spark and Parquet have. Source: Apache Spark, `XxHash64` expression; XXH64 by
Yann Collet.

This module is the reference in plain Python; `engine.kernels.hashing` does the same for whole columns, and
`spark_export` in the JVM. `tests/engine/test_keys.py` holds the three together.
"""

from collections.abc import Sequence

import xxhash

SPARK_SEED = 42
SECOND_HASH_PREFIX = "shoal"
SECOND_SEED = xxhash.xxh64_intdigest(SECOND_HASH_PREFIX.encode(), SPARK_SEED)
"""The second hash is the first one's chain, started from here."""

KEY_HASH = "__key_hash"
KEY_HASH_2 = "__key_hash_2"
"""The columns of published files that carry the two hashes."""


def key_identity(key: Sequence[str | int]) -> tuple[int, int]:
    """The two hashes of one key (its join key values in order), each as a signed 64-bit integer."""
    return _chain(key, SPARK_SEED), _chain(key, SECOND_SEED)


def _chain(key: Sequence[str | int], seed: int) -> int:
    for value in key:
        data = value.encode() if isinstance(value, str) else value.to_bytes(8, "little", signed=True)
        seed = xxhash.xxh64_intdigest(data, seed)
    return seed - (1 << 64) if seed >= 1 << 63 else seed
