"""Key identity: the 128 bits that identify a row in Spark, in Python and in the kernels.

The first hash is Spark's `xxhash64(key…)`: XXH64, chained over the columns, with seed 42 for the first column. A string
is hashed as its UTF-8 bytes, an integer as 8 little-endian bytes. The second hash is `xxhash64('shoal', key…)`. Both
hashes are kept as signed 64-bit integers, with the same form and order as in Spark and Parquet. Source: Apache Spark,
`XxHash64` expression; XXH64 by Yann Collet.

This module is the reference in plain Python. `shoal.engine.kernels.hashing` computes the same hashes for whole columns,
and `spark_export` computes them in the JVM. `tests/engine/test_keys.py` checks that the three implementations agree.
"""

from collections.abc import Sequence

import xxhash

SPARK_SEED = 42
SECOND_HASH_PREFIX = "shoal"
SECOND_SEED = xxhash.xxh64_intdigest(SECOND_HASH_PREFIX.encode(), SPARK_SEED)
"""The seed of the second hash. Apart from the seed, both hashes are computed in the same way."""

KEY_HASH = "__key_hash"
KEY_HASH_2 = "__key_hash_2"
"""The names of the columns with the two hashes in published files."""


def key_identity(key: Sequence[str | int]) -> tuple[int, int]:
    """Return the two hashes of one key (its join key values in order), each as a signed 64-bit integer."""
    return _chain(key, SPARK_SEED), _chain(key, SECOND_SEED)


def _chain(key: Sequence[str | int], seed: int) -> int:
    for value in key:
        data = value.encode() if isinstance(value, str) else value.to_bytes(8, "little", signed=True)
        seed = xxhash.xxh64_intdigest(data, seed)
    return seed - (1 << 64) if seed >= 1 << 63 else seed
