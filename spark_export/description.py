"""What a manifest says of a file of rows."""

import os
from typing import BinaryIO

import pyarrow.parquet as pq

from engine.export_root import checksum
from engine.keys import KEY_HASH
from engine.manifest import PublishedFile


def describe(name: str, stream: BinaryIO) -> PublishedFile:
    """The description of a file, which has rows and a descriptor."""
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
