"""Answer all keys of a view: find, judge and gather a block of them at a time, while its rows are in the caches."""

from typing import Any

import numpy as np
from numba import njit

from engine.kernels.compiling import kernel
from engine.kernels.finding import BLOCK, find_block
from engine.kernels.gathering import Status, gather_block, judge, place_columns
from engine.kernels.matrix import gather_matrix_block
from engine.kernels.memory import data_of

_PRESENT = int(Status.PRESENT)
_NULL_VALUE = int(Status.NULL_VALUE)
_NOT_FOUND = int(Status.NOT_FOUND)
_OUTSIDE_MAX_AGE = int(Status.OUTSIDE_MAX_AGE)


@kernel
def answer_columns(
    first: Any,
    second: Any,
    chunks: Any,
    segments: Any,
    zero_row: int,
    oldest: int,
    low_watermark: int,
    serve_stale: bool,
    status: Any,
    event_time: Any,
    program: Any,
    presence: Any,
    alike: Any,
    outputs: Any,
    arena: Any,
    at: Any,
    valid: Any,
    nulls: Any,
    counts: Any,
) -> int:
    """Answer with a column a feature.

    Args:
        first, second, chunks, segments: as in `engine.kernels.finding.find`.
        zero_row, oldest, low_watermark, serve_stale: as in `engine.kernels.gathering.judge`.
        status, event_time: the same, for all keys.
        program, presence, alike, outputs, valid: as in `engine.kernels.gathering.gather_block`.
        arena: uint8[bytes], becomes the columns.
        at: int64[features], becomes where in the arena each column begins.
        nulls: int64[features], becomes the number of nulls.
        counts: int64[STATUSES], becomes how many values have each Status.

    Returns:
        How many keys are OUTSIDE_MAX_AGE.
    """
    keys = first.size
    address, chunk_of = np.empty(BLOCK, np.int64), np.empty(BLOCK, np.int64)
    place_columns(keys, outputs, at)
    nulls[:] = 0
    stale = 0
    for start in range(0, keys, BLOCK):
        end = min(start + BLOCK, keys)
        rows, own_chunk = address[: end - start], chunk_of[: end - start]
        find_block(first[start:end], second[start:end], chunks, segments, rows, own_chunk)
        stale += judge(rows, zero_row, oldest, low_watermark, serve_stale, status[start:end], event_time[start:end])
        gather_block(
            rows, own_chunk, start, chunks, program, presence, alike, outputs, data_of(arena), at, valid, nulls
        )
    _count_values(status, valid, nulls, counts)
    return stale


@njit(inline="always")
def _count_values(status: Any, valid: Any, nulls: Any, counts: Any) -> None:
    """Count the values of each Status: those of rows that are PRESENT are NULL_VALUE where they are null."""
    features = nulls.size
    counts[:] = 0
    nulls_elsewhere = 0
    for key in range(status.size):
        counts[status[key]] += features
        if status[key] == _OUTSIDE_MAX_AGE:
            nulls_elsewhere += features - valid[:, key].sum()
    nulls_elsewhere += counts[_NOT_FOUND]
    counts[_NULL_VALUE] = nulls.sum() - nulls_elsewhere
    counts[_PRESENT] -= counts[_NULL_VALUE]


@kernel
def answer_matrix(
    first: Any,
    second: Any,
    chunks: Any,
    segments: Any,
    zero_row: int,
    oldest: int,
    low_watermark: int,
    serve_stale: bool,
    status: Any,
    event_time: Any,
    program: Any,
    spans: Any,
    presence: Any,
    matrix: Any,
    counts: Any,
) -> int:
    """Answer with a row of a matrix for each key.

    Args:
        first, second, chunks, segments: as in `engine.kernels.finding.find`.
        zero_row, oldest, low_watermark, serve_stale: as in `engine.kernels.gathering.judge`.
        status, event_time: the same, for all keys.
        program, spans, presence, matrix, counts: as in `engine.kernels.matrix.gather_matrix_block`.

    Returns:
        How many keys are OUTSIDE_MAX_AGE.
    """
    keys = first.size
    address, chunk_of = np.empty(BLOCK, np.int64), np.empty(BLOCK, np.int64)
    stale = 0
    for start in range(0, keys, BLOCK):
        end = min(start + BLOCK, keys)
        rows, own_chunk, of_block = address[: end - start], chunk_of[: end - start], status[start:end]
        find_block(first[start:end], second[start:end], chunks, segments, rows, own_chunk)
        stale += judge(rows, zero_row, oldest, low_watermark, serve_stale, of_block, event_time[start:end])
        gather_matrix_block(rows, own_chunk, start, chunks, program, spans, presence, of_block, matrix, counts)
    return stale
