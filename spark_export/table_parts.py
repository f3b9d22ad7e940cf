"""The rows of a table that this process has, as the Parquet files of an entry."""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

_ROWS_OF_A_GROUP = 1 << 17
_ROWS_OF_A_FILE = 1 << 20


def parts_of(table: pa.Table) -> Iterator[pa.Table]:
    """What goes into one file each, in order; nothing of a table without rows."""
    for start in range(0, table.num_rows, _ROWS_OF_A_FILE):
        yield table.slice(start, _ROWS_OF_A_FILE)


def write_part(part: pa.Table, where: Path | BinaryIO) -> None:
    """Write one of them."""
    pq.write_table(part, where, compression="zstd", row_group_size=_ROWS_OF_A_GROUP)
