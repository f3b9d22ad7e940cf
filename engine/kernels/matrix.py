"""Gather numeric features of found rows straight into one matrix, a row a key: what a ranker multiplies with.

A row of a segment holds its features side by side as a row of the matrix does, so that where they are the same numbers
in the same order a key costs one copy. Any other number is converted on the way.
"""

from enum import IntEnum
from typing import Any

import numpy as np
from numba import njit

from engine.kernels.finding import SEGMENT
from engine.kernels.gathering import Status, is_present
from engine.kernels.memory import float64_from_bits, load_f32, load_i32, load_i64, load_u8
from engine.layout import ROW_PRESENCE

# Columns of the program, int64[segments, features, PROGRAM_COLUMNS].
KIND = 0
OFFSET = 1
PRESENCE_BIT = 2
COLUMN = 3
WIDTH = 4
PROGRAM_COLUMNS = 5

# Columns of the spans, int64[segments, SPAN_COLUMNS]: all features of a segment as one run of float32, or SIZE 0.
SPAN_OFFSET = 0
SPAN_COLUMN = 1
SPAN_SIZE = 2
SPAN_COLUMNS = 3

STATUSES = max(Status) + 1


class Number(IntEnum):
    """How a feature lies in the rows of a segment."""

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
    return load_i64(address) / 1e6


@njit(inline="always")
def _has_all(row: int, presence: Any) -> Any:
    """Whether a row has every feature of which the presence mask, uint8[bytes], has a bit."""
    missing = 0
    for byte in range(presence.size):
        missing |= ~load_u8(row + ROW_PRESENCE + byte) & presence[byte]
    return missing == 0


@njit(nogil=True, cache=True)
def gather_matrix(
    address: Any,
    chunk_of: Any,
    chunks: Any,
    program: Any,
    spans: Any,
    presence: Any,
    status: Any,
    matrix: Any,
    counts: Any,
) -> None:
    """Gather every feature of the program into its columns of the matrix; what is null becomes NaN.

    Args:
        address, status: int64[keys] and uint8[keys] as `resolve` left them.
        chunk_of, chunks: as in `find`.
        program: int64[segments, features, PROGRAM_COLUMNS].
        spans: int64[segments, SPAN_COLUMNS].
        presence: uint8[segments, bytes], a presence bitmap with the bits of all features.
        matrix: float32 or float64[keys, columns].
        counts: int64[STATUSES], how many values have each Status, added to.
    """
    for key in range(address.size):
        row = address[key]
        segment = chunks[max(chunk_of[key], 0), SEGMENT] if chunks.shape[0] else 0
        span = spans[segment]
        if span[SPAN_SIZE] and _has_all(row, presence[segment]):
            source = row + span[SPAN_OFFSET]
            for number in range(span[SPAN_SIZE]):
                matrix[key, span[SPAN_COLUMN] + number] = load_f32(source + 4 * number)
            counts[status[key]] += program.shape[1]
            continue
        for feature in range(program.shape[1]):
            instruction = program[segment, feature]
            column = instruction[COLUMN]
            if instruction[KIND] == _ABSENT or not is_present(row, instruction[PRESENCE_BIT]):
                matrix[key, column : column + instruction[WIDTH]] = np.nan
                counts[_NULL_VALUE if status[key] == _PRESENT else status[key]] += 1
                continue
            counts[status[key]] += 1
            source = row + instruction[OFFSET]
            if instruction[KIND] <= _MICROSECONDS:
                matrix[key, column] = _number(instruction[KIND], source)
            else:
                for number in range(instruction[WIDTH]):
                    matrix[key, column + number] = load_f32(source + 4 * number)
