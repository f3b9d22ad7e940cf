"""The answer as an Arrow IPC stream of one record batch (see `LookupResult.to_arrow`): every type, nulls as nulls."""

import pyarrow as pa

from engine.result import LookupResult

MEDIA_TYPE = "application/vnd.apache.arrow.stream"


def encode(result: LookupResult) -> bytes:
    """The answer as an Arrow stream."""
    batch = result.to_arrow()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    content: bytes = sink.getvalue().to_pybytes()
    return content
