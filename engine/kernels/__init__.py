"""The compiled part of a lookup: hash keys, find rows, check the ages of the rows, gather values, and write the values
as text."""

import numpy as np
import pyarrow as pa

from shoal.engine.kernels import answering, finding, gathering, hashing, json_text, matrix, protobuf
from shoal.engine.kernels.memory import address_of


def warm() -> None:
    """Compile every kernel of a lookup for the argument types of a lookup, or load the machine code from the cache.

    Call this before worker processes fork. A worker then spends neither the time of its first request nor its own
    memory on the machine code.
    """
    hashes = hashing.seeds(1)
    hashing.chain_joined(np.frombuffer(b"key", np.uint8), *hashes)
    hashing.chain_array(pa.array(["key"]), *hashes)
    hashing.chain_array(pa.array([1]), *hashes)
    first, second = hashes.view(np.int64)
    address, chunk = np.empty((2, 1), np.int64)
    no_segments = np.zeros(1, np.int64)
    chunks = np.zeros((1, finding.CHUNK_COLUMNS), np.int64)
    finding.find(first, second, chunks, no_segments, address, chunk)
    zero_row = np.zeros(64, np.uint8)
    status = np.empty(1, np.uint8)
    event_time = np.empty(1, np.int64)
    found = first, second, chunks, no_segments, address_of(zero_row), 0, 0, False, status, event_time
    instructions = np.zeros((1, 1, gathering.PROGRAM_COLUMNS), np.int64)
    outputs = np.array([[16] + [0] * (gathering.OUTPUT_COLUMNS - 1)], np.int64)
    references = np.zeros(gathering.COLUMN_ALIGNMENT, np.uint8)
    valid = np.empty((1, 1), np.uint8)
    nulls, at = np.empty((2, 1), np.int64)
    presence = np.zeros((1, 1), np.uint8)
    same_layout = np.zeros(1, np.bool_)
    counts = np.zeros(gathering.STATUSES, np.int64)
    answering.answer_columns(*found, instructions, presence, same_layout, outputs, references, at, valid, nulls, counts)
    no_features = np.zeros((1, 0, matrix.PROGRAM_COLUMNS), np.int64)
    spans = np.zeros((1, matrix.SPAN_COLUMNS), np.int64)
    for dtype in (np.float32, np.float64):
        answering.answer_matrix(*found, no_features, spans, presence, np.empty((1, 0), dtype), counts)
    offsets = np.empty(2, np.int64)
    gathering.heap_offsets(address_of(references), valid[0], offsets, 1)
    gathering.copy_heap(address_of(references), offsets, address_of(zero_row))
    list_offsets = np.empty(2, np.int32)
    string_offsets = np.empty(1, np.int32)
    ends = offsets.astype(np.int32)
    gathering.string_lists_fit(address_of(zero_row), offsets)
    gathering.string_list_sizes(address_of(zero_row), ends, list_offsets)
    gathering.copy_string_lists(address_of(zero_row), ends, list_offsets, string_offsets, address_of(references))
    event_time[0] = 0
    forms = np.zeros((1, json_text.FORM_COLUMNS), np.int64)
    json_text.write_columns(forms, references, at, valid, zero_row, nulls)
    json_text.write_event_times(event_time, json_text.NULL_TIME, zero_row)
    json_text.write_statuses(np.ones(1, np.uint8), valid[0], zero_row)
    out = np.empty(64, np.uint8)
    protobuf.write_columns(np.zeros((1, protobuf.FIELD_COLUMNS), np.int64), references, at, valid, out, nulls)
    protobuf.write_heap(int(protobuf.Field.STRING), references, ends, np.zeros(1, np.uint8), out)
    protobuf.write_event_times(event_time, out)
    no_keys = np.frombuffer(b"?", np.uint8)
    protobuf.read_strings(no_keys, ends, out)
    protobuf.read_integers(no_keys, 0, event_time)
