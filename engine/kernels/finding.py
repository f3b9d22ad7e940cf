"""Find rows by key identity in a list of segments, newest first, a block of keys at a time.

Within a block the work goes in stages (directory, hashes, row), each of which asks for the memory of the next one
before any of it is needed: the misses of a block then overlap, where key after key would wait for each in turn.
"""

from typing import Any

import numpy as np
from numba import njit

from engine.kernels.compiling import kernel
from engine.kernels.memory import load_i64, load_u32, prefetch
from engine.layout import SMALL_ROWS

# Columns of the chunk table, int64[chunks, CHUNK_COLUMNS], in which a view's chunks stand, segment after segment.
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
    """How many of the chunks first … last-1 begin while a hash rises by one, on average."""
    return (last - first) / (np.float64(chunks[last - 1, MAX_HASH]) - np.float64(chunks[first, MIN_HASH]) + 1.0)


@njit(inline="always")
def _chunk_of(key_hash: int, chunks: Any, first: int, last: int, chunks_per_hash: float) -> Any:
    """The chunk among first … last-1, ascending by hash, whose range holds a hash; -1 if none does.

    Hashes are spread evenly: where the chunk would be if they were so exactly is next to where it is.
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
    """The address of the directory entry of a hash."""
    # The difference of two signed hashes may pass 2^63; as an unsigned number it is exact.
    distance = np.uint64(key_hash - least)
    return directory + 4 * np.int64(distance >> np.uint64(shift))


@njit(inline="always")
def _bucket_in(key_hash: int, chunks: Any, chunk: int) -> Any:
    """`_bucket` in a chunk."""
    return _bucket(key_hash, chunks[chunk, MIN_HASH], chunks[chunk, SHIFT], chunks[chunk, DIRECTORY])


@njit(inline="always")
def _matching_row(first: int, second: int, chunks: Any, chunk: int, row: int) -> Any:
    """The address of the row with both hashes, from the first row with the first hash on; NOT_FOUND if none has."""
    while row < chunks[chunk, ROWS] and load_i64(chunks[chunk, HASHES] + 8 * row) == first:
        address = chunks[chunk, ROW_DATA] + chunks[chunk, STRIDE] * row
        if load_i64(address) == second:
            return address
        row += 1
    return NOT_FOUND


@njit(inline="always")
def _first_candidate(key_hash: int, bucket: int, rows: int, hashes: int, row_data: int, stride: int) -> Any:
    """The first row of a bucket, at address `bucket` of the directory, with a first hash, as -1 - row; NOT_FOUND if
    none has it. The row is asked for: the second hash decides, and stands in it."""
    # Nobody has checked the directory: a flipped bit in it must not lead out of the chunk.
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
    """`_candidates` for a segment of one small chunk, whose directory and hashes need no prefetching."""
    least, most, shift = chunks[chunk, MIN_HASH], chunks[chunk, MAX_HASH], chunks[chunk, SHIFT]
    directory, hashes = chunks[chunk, DIRECTORY], chunks[chunk, HASHES]
    row_data, stride, rows = chunks[chunk, ROW_DATA], chunks[chunk, STRIDE], chunks[chunk, ROWS]
    for key in range(first.size):
        if address[key] == NOT_FOUND and least <= first[key] <= most:
            bucket = _bucket(first[key], least, shift, directory)
            address[key] = _first_candidate(first[key], bucket, rows, hashes, row_data, stride)
            chunk_of[key] = chunk


@njit(inline="always")
def _candidates(first: Any, chunks: Any, first_chunk: int, last_chunk: int, address: Any, chunk_of: Any) -> None:
    """For those keys whose address is NOT_FOUND so far, the first candidate in a segment of the chunks first_chunk …
    last_chunk - 1."""
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
            rows, hashes = chunks[chunk, ROWS], chunks[chunk, HASHES]
            row_data, stride = chunks[chunk, ROW_DATA], chunks[chunk, STRIDE]
            address[key] = _first_candidate(first[key], bucket, rows, hashes, row_data, stride)


@njit(inline="always")
def _candidates_in_segments(
    first: Any, chunks: Any, segments: Any, first_segment: int, address: Any, chunk_of: Any
) -> None:
    """For keys whose address is NOT_FOUND, the first candidate of the newest segment from `first_segment` on that has
    one."""
    for segment in range(first_segment, segments.size - 1):
        first_chunk, last_chunk = segments[segment], segments[segment + 1]
        if last_chunk - first_chunk == 1 and chunks[first_chunk, ROWS] <= SMALL_ROWS:
            _candidates_in_small_chunk(first, chunks, first_chunk, address, chunk_of)
        elif first_chunk < last_chunk:
            _candidates(first, chunks, first_chunk, last_chunk, address, chunk_of)


@kernel
def find_block(first: Any, second: Any, chunks: Any, segments: Any, address: Any, chunk_of: Any) -> None:
    """`find` for at most BLOCK keys."""
    address[:] = NOT_FOUND
    chunk_of[:] = -1
    _candidates_in_segments(first, chunks, segments, 0, address, chunk_of)
    for key in range(first.size):
        # One of them is nearly always it: two keys in billions have the same first hash.
        while address[key] < 0:
            chunk = chunk_of[key]
            address[key] = _matching_row(first[key], second[key], chunks, chunk, -1 - address[key])
            if address[key] == NOT_FOUND:
                one, older = slice(key, key + 1), chunks[chunk, SEGMENT] + 1
                _candidates_in_segments(first[one], chunks, segments, older, address[one], chunk_of[one])


@kernel
def find(first: Any, second: Any, chunks: Any, segments: Any, address: Any, chunk_of: Any) -> None:
    """Find each key's newest row; a tombstone is a row.

    Args:
        first, second: int64[keys], the two hashes.
        chunks: the chunk table.
        segments: int64[segments + 1], where each segment's chunks begin, newest segment first.
        address: int64[keys], becomes the row's address, or NOT_FOUND.
        chunk_of: int64[keys], becomes the row's chunk; where nothing was found, some chunk or -1.
    """
    for start in range(0, first.size, BLOCK):
        end = start + BLOCK
        find_block(first[start:end], second[start:end], chunks, segments, address[start:end], chunk_of[start:end])
