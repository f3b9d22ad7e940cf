"""Answer all keys of a view, one block of keys at a time. For each block, find the rows, check their ages and gather
their values, while the rows are in the CPU caches."""

from typing import Any

import numpy as np
from numba import njit

from shoal.engine.kernels.compiling import kernel
from shoal.engine.kernels.finding import BLOCK, find_block
from shoal.engine.kernels.gathering import Status, gather_block, judge_row, place_columns
from shoal.engine.kernels.matrix import gather_matrix_block
from shoal.engine.kernels.memory import data_of

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
    same_layout: Any,
    outputs: Any,
    arena: Any,
    column_starts: Any,
    valid: Any,
    nulls: Any,
    counts: Any,
) -> int:
    """Write the answer as one column per feature.

    Args:
        first, second, chunks, segments: as in `shoal.engine.kernels.finding.find`.
        zero_row, oldest, low_watermark, serve_stale: as in `shoal.engine.kernels.gathering.judge_row`.
        status, event_time: as in `judge_row`, but for all keys.
        program, presence, same_layout, outputs, valid: as in `shoal.engine.kernels.gathering.gather_block`.
        arena: uint8[bytes]: receives the columns.
        column_starts: int64[features]: receives the start of each column in the arena, in bytes.
        nulls: int64[features]: receives the number of nulls.
        counts: int64[STATUSES]: receives the number of values with each Status.

    Returns:
        The number of keys that are OUTSIDE_MAX_AGE.
    """
    keys = first.size
    address = np.empty(BLOCK, np.int64)
    chunk_of = np.empty(BLOCK, np.int64)
    place_columns(keys, outputs, column_starts)
    nulls[:] = 0
    stale = 0
    for start in range(0, keys, BLOCK):
        end = min(start + BLOCK, keys)
        rows = address[: end - start]
        own_chunk = chunk_of[: end - start]
        find_block(first[start:end], second[start:end], chunks, segments, rows, own_chunk)
        stale += judge_row(rows, zero_row, oldest, low_watermark, serve_stale, status[start:end], event_time[start:end])
        gather_block(
            rows,
            own_chunk,
            start,
            chunks,
            program,
            presence,
            same_layout,
            outputs,
            data_of(arena),
            column_starts,
            valid,
            nulls,
        )
    _count_values(status, valid, nulls, counts)
    return stale


@njit(inline="always")
def _count_values(status: Any, valid: Any, nulls: Any, counts: Any) -> None:
    """Count the values with each Status. A null in a row that is PRESENT counts as NULL_VALUE."""
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
    """Write the answer as one matrix row per key.

    Args:
        first, second, chunks, segments: as in `shoal.engine.kernels.finding.find`.
        zero_row, oldest, low_watermark, serve_stale: as in `shoal.engine.kernels.gathering.judge_row`.
        status, event_time: as in `judge_row`, but for all keys.
        program, spans, presence, matrix, counts: as in `shoal.engine.kernels.matrix.gather_matrix_block`.

    Returns:
        The number of keys that are OUTSIDE_MAX_AGE.
    """
    keys = first.size
    address = np.empty(BLOCK, np.int64)
    chunk_of = np.empty(BLOCK, np.int64)
    stale = 0
    for start in range(0, keys, BLOCK):
        end = min(start + BLOCK, keys)
        rows = address[: end - start]
        own_chunk = chunk_of[: end - start]
        of_block = status[start:end]
        find_block(first[start:end], second[start:end], chunks, segments, rows, own_chunk)
        stale += judge_row(rows, zero_row, oldest, low_watermark, serve_stale, of_block, event_time[start:end])
        gather_matrix_block(rows, own_chunk, start, chunks, program, spans, presence, of_block, matrix, counts)
    return stale
