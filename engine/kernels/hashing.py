"""XXH64 over whole key columns: both hashes of a key in one pass, chained from column to column.

Source: the XXH64 specification by Yann Collet (doc/xxhash_spec.md of the xxHash project). `shoal.engine.format.keys` is
the reference implementation, and defines how the two hashes identify a key.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from numba import njit

from shoal.engine.format.keys import SECOND_SEED, SPARK_SEED
from shoal.engine.kernels.compiling import kernel
from shoal.engine.kernels.memory import data_of, load_i32, load_u8, load_u32, load_u64

SEPARATOR = 0
"""The byte between the values of a joined text. Few strings contain this byte. A column with such a string is hashed as
an Arrow array."""

PRIME_1 = np.uint64(0x9E3779B185EBCA87)
PRIME_2 = np.uint64(0xC2B2AE3D27D4EB4F)
PRIME_3 = np.uint64(0x165667B19E3779F9)
PRIME_4 = np.uint64(0x85EBCA77C2B2AE63)
PRIME_5 = np.uint64(0x27D4EB2F165667C5)


@njit(inline="always")
def _rotate(value: Any, bits: int) -> Any:
    return (value << np.uint64(bits)) | (value >> np.uint64(64 - bits))


@njit(inline="always")
def _round(accumulator: Any, lane: Any) -> Any:
    return _rotate(accumulator + lane * PRIME_2, 31) * PRIME_1


@njit(inline="always")
def _merge(accumulator: Any, lane: Any) -> Any:
    return (accumulator ^ _round(np.uint64(0), lane)) * PRIME_1 + PRIME_4


@njit(inline="always")
def _avalanche(value: Any) -> Any:
    value = (value ^ (value >> np.uint64(33))) * PRIME_2
    value = (value ^ (value >> np.uint64(29))) * PRIME_3
    return value ^ (value >> np.uint64(32))


@njit(inline="always")
def _hash_word(word: Any, seed: Any) -> Any:
    """Return the XXH64 of 8 bytes."""
    value = (seed + PRIME_5 + np.uint64(8)) ^ _round(np.uint64(0), word)
    return _avalanche(_rotate(value, 27) * PRIME_1 + PRIME_4)


@njit(inline="always")
def _stripes(address: int, end: int, seed: Any) -> Any:
    """Return the accumulator after the 32-byte stripes of a long input."""
    lane_1 = seed + PRIME_1 + PRIME_2
    lane_2 = seed + PRIME_2
    lane_3 = seed
    lane_4 = seed - PRIME_1
    while address + 32 <= end:
        lane_1 = _round(lane_1, load_u64(address))
        lane_2 = _round(lane_2, load_u64(address + 8))
        lane_3 = _round(lane_3, load_u64(address + 16))
        lane_4 = _round(lane_4, load_u64(address + 24))
        address += 32
    value = _rotate(lane_1, 1) + _rotate(lane_2, 7) + _rotate(lane_3, 12) + _rotate(lane_4, 18)
    return _merge(_merge(_merge(_merge(value, lane_1), lane_2), lane_3), lane_4)


@njit(inline="always")
def _eight(value: Any, lane: Any) -> Any:
    return _rotate(value ^ lane, 27) * PRIME_1 + PRIME_4


@njit(inline="always")
def _four(value: Any, lane: Any) -> Any:
    return _rotate(value ^ lane, 23) * PRIME_2 + PRIME_3


@njit(inline="always")
def _one(value: Any, lane: Any) -> Any:
    return _rotate(value ^ lane, 11) * PRIME_1


@njit(inline="always")
def _hash_bytes(address: int, size: int, first_seed: Any, second_seed: Any) -> Any:
    """Return the XXH64 of `size` bytes at an address, for each of two seeds, as uint64. Keys are short, and each hash
    is a chain of dependent multiplications. Both hashes are computed together, so that the two chains overlap in the
    CPU."""
    end = address + size
    if size >= 32:
        first = _stripes(address, end, first_seed)
        second = _stripes(address, end, second_seed)
        address += size // 32 * 32
    else:
        first = first_seed + PRIME_5
        second = second_seed + PRIME_5
    first += np.uint64(size)
    second += np.uint64(size)
    while address + 8 <= end:
        lane = _round(np.uint64(0), load_u64(address))
        first = _eight(first, lane)
        second = _eight(second, lane)
        address += 8
    if address + 4 <= end:
        lane = np.uint64(load_u32(address)) * PRIME_1
        first = _four(first, lane)
        second = _four(second, lane)
        address += 4
    while address < end:
        lane = np.uint64(load_u8(address)) * PRIME_5
        first = _one(first, lane)
        second = _one(second, lane)
        address += 1
    return _avalanche(first), _avalanche(second)


@kernel
def chain_strings(offsets: int, data: int, first: Any, second: Any) -> None:
    """Chain a string column into both hashes.

    Args:
        offsets: address of the column's Arrow offsets, int32[rows + 1].
        data: address of the column's UTF-8 bytes.
        first, second: uint64[rows], the seeds on entry, the hashes on return.
    """
    for row in range(first.size):
        start = load_i32(offsets + 4 * row)
        size = load_i32(offsets + 4 * row + 4) - start
        first[row], second[row] = _hash_bytes(data + start, size, first[row], second[row])


@kernel
def chain_joined(text: Any, first: Any, second: Any) -> Any:
    """Chain a string column into both hashes. The column is one text: its values, with SEPARATOR between them.

    Args:
        text: uint8[bytes], UTF-8.
        first, second: as in `chain_strings`.

    Returns:
        Whether there are as many values as rows. If not, a value contains a separator, and the hashes are unchanged.
    """
    separators = 0
    for position in range(text.size):
        separators += text[position] == SEPARATOR
    if separators != first.size - 1:
        return False
    data = data_of(text)
    start = 0
    for row in range(first.size):
        end = start
        while end < text.size and text[end] != SEPARATOR:
            end += 1
        first[row], second[row] = _hash_bytes(data + start, end - start, first[row], second[row])
        start = end + 1
    return True


@kernel
def chain_integers(values: int, first: Any, second: Any) -> None:
    """Chain an int64 column at the address `values` into both hashes. `first` and `second` are as in
    `chain_strings`."""
    for row in range(first.size):
        word = load_u64(values + 8 * row)
        first[row] = _hash_word(word, first[row])
        second[row] = _hash_word(word, second[row])


def seeds(keys: int) -> npt.NDArray[np.uint64]:
    """Return the initial values of both hashes of all keys, uint64[2, keys]."""
    hashes = np.empty((2, keys), np.uint64)
    hashes[0] = SPARK_SEED
    hashes[1] = SECOND_SEED
    return hashes


def chain_array(column: pa.Array, first: npt.NDArray[np.uint64], second: npt.NDArray[np.uint64]) -> None:
    """Chain a join key's Arrow array (string or int64, no nulls) into both hashes, uint64[keys] each."""
    if pa.types.is_int64(column.type):
        chain_integers(column.buffers()[1].address + 8 * column.offset, first, second)
    else:
        _, offsets, data = column.buffers()
        chain_strings(offsets.address + 4 * column.offset, data.address if data else 0, first, second)


def key_hashes(join_keys: Sequence[pa.Array]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return both hashes of keys, int64[keys] each, from one Arrow array (string or int64, no nulls) per join key."""
    first, second = seeds(len(join_keys[0]))
    for column in join_keys:
        chain_array(column, first, second)
    return first.view(np.int64), second.view(np.int64)
