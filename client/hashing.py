"""The first key hash of rows, with which rows are divided into shards: XXH64 chained over the join keys from seed 42.

A string is hashed as its UTF-8 bytes, an integer as 8 little-endian bytes; the result is signed. The hash equals
Spark's `xxhash64(key…)`, and the hash in Shoal's loaders and servers.
"""

from collections.abc import Sequence
from itertools import repeat
from typing import Any

import numpy as np
import numpy.typing as npt
from xxhash import xxh64_intdigest

from shoal.client.errors import RequestInvalid

_SEED = 42
_LEAST_HASH = -(1 << 63)
_HASHES = 1 << 64


def first_hashes(keys: Sequence[tuple[str, str, Sequence[Any]]]) -> npt.NDArray[np.int64]:
    """Return int64[rows], the first hashes of keys.

    Args:
        keys: the name, the type ("string" or "int64") and the values of each join key, in order.

    Raises:
        RequestInvalid: a value is not of its join key's type.
    """
    hashes: Any = repeat(_SEED)
    for name, kind, values in keys:
        try:
            if kind == "string":
                data = [value.encode() for value in values]
            else:
                data = [value.to_bytes(8, "little", signed=True) for value in values]
        except (AttributeError, OverflowError, UnicodeEncodeError) as error:
            raise RequestInvalid(f"entity {name!r} must be {kind}: {error}") from None
        hashes = list(map(xxh64_intdigest, data, hashes))
    return np.array(hashes, np.uint64).view(np.int64)


def shard_starts(count: int) -> npt.NDArray[np.int64]:
    """Return int64[count], the smallest hash of each shard."""
    return np.array([_LEAST_HASH + _HASHES * number // count for number in range(count)], np.int64)


def shards_of(hashes: npt.NDArray[np.int64], starts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return int64[rows], the shard of each hash, counted from 0."""
    return np.searchsorted(starts, hashes, side="right").astype(np.int64) - 1
