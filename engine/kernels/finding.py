"""Find rows by key identity in a list of segments, newest first, one block of keys at a time.

Within a block the work has three stages: directory, hashes, row. Each stage prefetches the memory of the next stage for
all keys of the block. So the cache misses of a block overlap. If keys were found one after the other, every miss would
cost its full latency.
"""

from typing import Any

import numpy as np
from numba import njit

from shoal.engine.format.layout import SMALL_ROWS
from shoal.engine.kernels.compiling import kernel
from shoal.engine.kernels.memory import load_i64, load_u32, prefetch

# Columns of the chunk table, int64[chunks, CHUNK_COLUMNS]: one row for each chunk of a view, segment after segment.
MIN_HASH = 0
MAX_HASH = 1
SHIFT = 2
DIRECTORY = 3
HASHES = 4
ROW_DATA = 5
STRIDE = 6
HEAP = 7
SEGMENT = 8
ROWS = 9
HEAP_SIZE = 10
CHUNK_COLUMNS = 11

BLOCK = 64
NOT_FOUND = 0

_CACHE_LINE = 64
_PREFETCHED_ROW_BYTES = 512


@njit(inline="always")
def _chunks_per_hash(chunks: Any, first: int, last: int) -> Any:
    """Return the average number of chunks per hash value, among the chunks first … last-1."""
    return (last - first) / (np.float64(chunks[last - 1, MAX_HASH]) - np.float64(chunks[first, MIN_HASH]) + 1.0)


@njit(inline="always")
def _chunk_of(key_hash: int, chunks: Any, first: int, last: int, chunks_per_hash: float) -> Any:
    """Return the chunk whose range contains a hash; -1 if there is no such chunk. The chunks first … last-1 are in
    ascending order of hashes.

    Hashes are spread almost evenly. The first guess assumes that they are spread perfectly evenly, so the right chunk
    is near the guess.
    """
    guess = (np.float64(key_hash) - np.float64(chunks[first, MIN_HASH])) * chunks_per_hash
    chunk = first + np.int64(min(max(guess, 0.0), last - first - 1.0))
    while chunk > first and key_hash < chunks[chunk, MIN_HASH]:
        chunk -= 1
    while chunk + 1 < last and key_hash >= chunks[chunk + 1, MIN_HASH]:
        chunk += 1
    if chunks[chunk, MIN_HASH] <= key_hash <= chunks[chunk, MAX_HASH]:
        return chunk
    return -1


@njit(inline="always")
def _bucket(key_hash: int, least: int, shift: int, directory: int) -> Any:
    """Return the address of a hash's directory entry."""
    # The difference of two signed hashes may exceed 2^63; as an unsigned number, the difference is exact.
    distance = np.uint64(key_hash - least)
    return directory + 4 * np.int64(distance >> np.uint64(shift))


@njit(inline="always")
def _bucket_in(key_hash: int, chunks: Any, chunk: int) -> Any:
    """Return the address of a hash's directory entry in a chunk."""
    return _bucket(key_hash, chunks[chunk, MIN_HASH], chunks[chunk, SHIFT], chunks[chunk, DIRECTORY])


@njit(inline="always")
def _matching_row(first: int, second: int, chunks: Any, chunk: int, row: int) -> Any:
    """Return the address of the row with both hashes, or NOT_FOUND. `row` is the first row with the first hash."""
    while row < chunks[chunk, ROWS] and load_i64(chunks[chunk, HASHES] + 8 * row) == first:
        address = chunks[chunk, ROW_DATA] + chunks[chunk, STRIDE] * row
        if load_i64(address) == second:
            return address
        row += 1
    return NOT_FOUND


@njit(inline="always")
def _first_candidate(key_hash: int, bucket: int, rows: int, hashes: int, row_data: int, stride: int) -> Any:
    """Search a bucket for the first row with a first hash. Return `-1 - row`, or NOT_FOUND if there is no such row.
    `bucket` is the address of the directory entry. Prefetch the row, because the caller compares the second hash, which
    is in the row."""
    # The directory has not been verified. Even if a bit of the directory is flipped, this code must not read outside
    # the chunk.
    for row in range(load_u32(bucket), min(load_u32(bucket + 4), rows)):
        if load_i64(hashes + 8 * row) == key_hash:
            candidate = row_data + stride * row
            length = min(stride, _PREFETCHED_ROW_BYTES)
            for position in range(0, length, _CACHE_LINE):
                prefetch(candidate + position)
            prefetch(candidate + length - 1)
            return -1 - row
    return NOT_FOUND


@njit(inline="always")
def _candidates_in_small_chunk(first: Any, chunks: Any, chunk: int, address: Any, chunk_of: Any) -> None:
    """Do the same as `_candidates` for a segment of one small chunk. The directory and the hashes of such a chunk need
    no prefetching."""
    least = chunks[chunk, MIN_HASH]
    most = chunks[chunk, MAX_HASH]
    shift = chunks[chunk, SHIFT]
    directory = chunks[chunk, DIRECTORY]
    hashes = chunks[chunk, HASHES]
    row_data = chunks[chunk, ROW_DATA]
    stride = chunks[chunk, STRIDE]
    rows = chunks[chunk, ROWS]
    for key in range(first.size):
        if address[key] == NOT_FOUND and least <= first[key] <= most:
            bucket = _bucket(first[key], least, shift, directory)
            address[key] = _first_candidate(first[key], bucket, rows, hashes, row_data, stride)
            chunk_of[key] = chunk


@njit(inline="always")
def _candidates(first: Any, chunks: Any, first_chunk: int, last_chunk: int, address: Any, chunk_of: Any) -> None:
    """For all keys without an address so far, set `address` and `chunk_of` to the first candidate in one segment. The
    segment consists of the chunks first_chunk … last_chunk - 1."""
    chunks_per_hash = _chunks_per_hash(chunks, first_chunk, last_chunk)
    for key in range(first.size):
        if address[key] == NOT_FOUND:
            chunk = _chunk_of(first[key], chunks, first_chunk, last_chunk, chunks_per_hash)
            chunk_of[key] = chunk
            if chunk >= 0:
                prefetch(_bucket_in(first[key], chunks, chunk))
    for key in range(first.size):
        if address[key] == NOT_FOUND and chunk_of[key] >= 0:
            chunk = chunk_of[key]
            prefetch(chunks[chunk, HASHES] + 8 * load_u32(_bucket_in(first[key], chunks, chunk)))
    for key in range(first.size):
        if address[key] == NOT_FOUND and chunk_of[key] >= 0:
            chunk = chunk_of[key]
            bucket = _bucket_in(first[key], chunks, chunk)
            rows = chunks[chunk, ROWS]
            hashes = chunks[chunk, HASHES]
            row_data = chunks[chunk, ROW_DATA]
            stride = chunks[chunk, STRIDE]
            address[key] = _first_candidate(first[key], bucket, rows, hashes, row_data, stride)


@njit(inline="always")
def _candidates_in_segments(
    first: Any, chunks: Any, segments: Any, first_segment: int, address: Any, chunk_of: Any
) -> None:
    """For all keys without an address so far, set `address` and `chunk_of` to the first candidate in the newest segment
    that has a candidate. The search begins at `first_segment`."""
    for segment in range(first_segment, segments.size - 1):
        first_chunk = segments[segment]
        last_chunk = segments[segment + 1]
        if last_chunk - first_chunk == 1 and chunks[first_chunk, ROWS] <= SMALL_ROWS:
            _candidates_in_small_chunk(first, chunks, first_chunk, address, chunk_of)
        elif first_chunk < last_chunk:
            _candidates(first, chunks, first_chunk, last_chunk, address, chunk_of)


@kernel
def find_block(first: Any, second: Any, chunks: Any, segments: Any, address: Any, chunk_of: Any) -> None:
    """Find rows as `find` does, for at most BLOCK keys."""
    address[:] = NOT_FOUND
    chunk_of[:] = -1
    _candidates_in_segments(first, chunks, segments, 0, address, chunk_of)
    for key in range(first.size):
        # The first candidate is nearly always the right row: only among billions of keys do two keys have the same
        # first hash.
        while address[key] < 0:
            chunk = chunk_of[key]
            address[key] = _matching_row(first[key], second[key], chunks, chunk, -1 - address[key])
            if address[key] == NOT_FOUND:
                one = slice(key, key + 1)
                older = chunks[chunk, SEGMENT] + 1
                _candidates_in_segments(first[one], chunks, segments, older, address[one], chunk_of[one])


@kernel
def find(first: Any, second: Any, chunks: Any, segments: Any, address: Any, chunk_of: Any) -> None:
    """Find each key's newest row. A tombstone counts as a row.

    Args:
        first, second: int64[keys], the two hashes.
        chunks: the chunk table.
        segments: int64[segments + 1], the first chunk of each segment, newest segment first, and the number of chunks.
        address: int64[keys]: receives the row's address, or NOT_FOUND.
        chunk_of: int64[keys]: receives the row's chunk; if there is no row, any chunk or -1.
    """
    for start in range(0, first.size, BLOCK):
        end = start + BLOCK
        find_block(first[start:end], second[start:end], chunks, segments, address[start:end], chunk_of[start:end])
