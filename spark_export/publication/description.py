"""The description of a file of rows in a manifest."""

import os
from typing import BinaryIO

import pyarrow.parquet as pq

from shoal.engine.format.keys import KEY_HASH
from shoal.engine.root.export_root import checksum
from shoal.engine.root.manifest import PublishedFile


def describe(name: str, stream: BinaryIO) -> PublishedFile:
    """Return the description of a file. The file must contain rows, and the stream must have a file descriptor."""
    metadata = pq.read_metadata(stream)
    position = metadata.schema.names.index(KEY_HASH)
    statistics = [metadata.row_group(group).column(position).statistics for group in range(metadata.num_row_groups)]
    return PublishedFile(
        path=name,
        rows=metadata.num_rows,
        bytes=os.fstat(stream.fileno()).st_size,
        checksum=checksum(stream),
        min_key_hash=min(group.min for group in statistics),
        max_key_hash=max(group.max for group in statistics),
    )
