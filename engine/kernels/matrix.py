"""Gather numeric features of found rows directly into one matrix with one row per key: the input of a ranker.

In a row of a segment, the features are next to each other, as in a row of the matrix. If both rows contain the same
float32 numbers in the same order, one copy per key is enough. Any other number is converted during the copy.
"""

from enum import IntEnum
from typing import Any

import numpy as np
from numba import njit

from shoal.engine.kernels.finding import SEGMENT
from shoal.engine.kernels.gathering import Status, has_all, in_range, is_present
from shoal.engine.kernels.memory import (
    copy_bytes,
    data_of,
    float64_from_bits,
    load_f32,
    load_i32,
    load_i64,
    load_u8,
)

# Columns of the program, int64[segments, features, PROGRAM_COLUMNS].
KIND = 0
OFFSET = 1
PRESENCE_BIT = 2
COLUMN = 3
WIDTH = 4
PROGRAM_COLUMNS = 5

# Columns of the table of spans, int64[segments, SPAN_COLUMNS]. A span describes all features of a segment as one
# contiguous run of float32. SPAN_SIZE is 0 if the features are not such a run.
SPAN_OFFSET = 0
SPAN_COLUMN = 1
SPAN_SIZE = 2
SPAN_COLUMNS = 3


class Number(IntEnum):
    """The storage of a feature in the rows of a segment."""

    ABSENT = 0
    BOOL = 1
    INT32 = 2
    INT64 = 3
    FLOAT32 = 4
    FLOAT64 = 5
    MICROSECONDS = 6
    FLOATS = 7


_ABSENT = int(Number.ABSENT)
_BOOL = int(Number.BOOL)
_INT32 = int(Number.INT32)
_INT64 = int(Number.INT64)
_FLOAT32 = int(Number.FLOAT32)
_FLOAT64 = int(Number.FLOAT64)
_MICROSECONDS = int(Number.MICROSECONDS)
_PRESENT = int(Status.PRESENT)
_NULL_VALUE = int(Status.NULL_VALUE)


@njit(inline="always")
def _number(kind: int, address: int) -> Any:
    if kind == _FLOAT32:
        return np.float64(load_f32(address))
    if kind == _INT64:
        return np.float64(load_i64(address))
    if kind == _INT32:
        return np.float64(load_i32(address))
    if kind == _FLOAT64:
        return float64_from_bits(load_i64(address))
    if kind == _BOOL:
        return np.float64(load_u8(address))
    return in_range(load_i64(address)) / 1e6


@njit(inline="always")
def gather_matrix_block(
    address: Any,
    chunk_of: Any,
    start: int,
    chunks: Any,
    program: Any,
    spans: Any,
    presence: Any,
    status: Any,
    matrix: Any,
    counts: Any,
) -> None:
    """For the keys of a block, gather every feature of the program into the feature's columns of the matrix. A null
    becomes NaN.

    Args:
        address, chunk_of: int64[keys of the block] as `judge_row` left them.
        start: the number of the block's first key.
        chunks: the chunk table.
        program: int64[segments, features, PROGRAM_COLUMNS].
        spans: int64[segments, SPAN_COLUMNS].
        presence: uint8[segments, bytes], a presence bitmap with the bits of all features.
        status: uint8[keys of the block].
        matrix: float32 or float64[keys, columns], in C order.
        counts: int64[STATUSES], the number of values with each Status; this call adds to it.
    """
    for number in range(address.size):
        row = address[number]
        key = start + number
        segment = chunks[max(chunk_of[number], 0), SEGMENT]
        span = spans[segment]
        if span[SPAN_SIZE] and has_all(row, presence[segment]):
            # Only a matrix of float32 has spans.
            to = data_of(matrix) + 4 * (matrix.shape[1] * key + span[SPAN_COLUMN])
            copy_bytes(to, row + span[SPAN_OFFSET], 4 * span[SPAN_SIZE])
            counts[status[number]] += program.shape[1]
            continue
        for feature in range(program.shape[1]):
            instruction = program[segment, feature]
            column = instruction[COLUMN]
            if instruction[KIND] == _ABSENT or not is_present(row, instruction[PRESENCE_BIT]):
                matrix[key, column : column + instruction[WIDTH]] = np.nan
                counts[_NULL_VALUE if status[number] == _PRESENT else status[number]] += 1
                continue
            counts[status[number]] += 1
            source = row + instruction[OFFSET]
            if instruction[KIND] <= _MICROSECONDS:
                matrix[key, column] = _number(instruction[KIND], source)
            else:
                for item in range(instruction[WIDTH]):
                    matrix[key, column + item] = load_f32(source + 4 * item)
