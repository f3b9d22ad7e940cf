"""The compiled part of a lookup: hash, find, judge, gather."""

import numpy as np
import pyarrow as pa

from engine.kernels import finding, gathering, hashing, matrix
from engine.kernels.memory import address_of


def warm() -> None:
    """Compile every kernel of a lookup, or load it from the cache, for the types that a lookup calls it with.

    It is done before worker processes fork, so that none spends its first request, or memory of its own, on it.
    """
    first, second = (hashes.view(np.int64) for hashes in hashing.key_hashes([pa.array(["key"])]))
    hashing.key_hashes([pa.array([1])])
    address, chunk = np.empty(1, np.int64), np.empty(1, np.int64)
    no_segments = np.zeros(1, np.int64)
    chunks = np.zeros((1, finding.CHUNK_COLUMNS), np.int64)
    finding.find(first, second, chunks, no_segments, address, chunk)
    zero_row = np.zeros(64, np.uint8)
    status, event_time = np.empty(1, np.uint8), np.empty(1, np.int64)
    gathering.resolve(address, address_of(zero_row), 0, False, status, event_time)
    instructions = np.zeros((1, 1, gathering.PROGRAM_COLUMNS), np.int64)
    outputs = np.array([[16] + [0] * (gathering.OUTPUT_COLUMNS - 1)], np.int64)
    references, valid = np.zeros(gathering.COLUMN_ALIGNMENT, np.uint8), np.empty((1, 1), np.uint8)
    nulls, at = np.empty(1, np.int64), np.empty(1, np.int64)
    gathering.gather(address, chunk, chunks, instructions, outputs, address_of(references), valid, nulls, at)
    no_features = np.zeros((1, 0, matrix.PROGRAM_COLUMNS), np.int64)
    spans, presence = np.zeros((1, matrix.SPAN_COLUMNS), np.int64), np.zeros((1, 1), np.uint8)
    for dtype in (np.float32, np.float64):
        numbers, counts = np.empty((1, 0), dtype), np.zeros(matrix.STATUSES, np.int64)
        matrix.gather_matrix(address, chunk, chunks, no_features, spans, presence, status, numbers, counts)
    offsets = np.empty(2, np.int64)
    gathering.heap_offsets(address_of(references), valid[0], offsets)
    gathering.copy_heap(address_of(references), offsets, address_of(zero_row))
    list_offsets, string_offsets = np.empty(2, np.int32), np.empty(1, np.int32)
    ends = offsets.astype(np.int32)
    gathering.string_list_sizes(address_of(zero_row), ends, list_offsets)
    gathering.copy_string_lists(address_of(zero_row), ends, list_offsets, string_offsets, address_of(references))
