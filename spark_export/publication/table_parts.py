"""Write the rows of an in-memory table as the Parquet files of an entry."""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

_ROWS_OF_A_GROUP = 1 << 17
_ROWS_OF_A_FILE = 1 << 20


def parts_of(table: pa.Table) -> Iterator[pa.Table]:
    """Yield the slices of a table that each go into one file, in order; nothing for a table without rows."""
    for start in range(0, table.num_rows, _ROWS_OF_A_FILE):
        yield table.slice(start, _ROWS_OF_A_FILE)


def write_part(part: pa.Table, where: Path | BinaryIO) -> None:
    """Write one slice of a table as a Parquet file."""
    names = dictionary_columns(part.schema)
    pq.write_table(part, where, compression="zstd", row_group_size=_ROWS_OF_A_GROUP, use_dictionary=names)


def dictionary_columns(schema: pa.Schema) -> list[str]:
    """Return the paths of the columns to encode with a dictionary: strings only, because their values often repeat.

    Arrow builds a dictionary of up to a megabyte before it gives up on a column. For hashes and random floats, this
    takes five times as long as writing the plain values, and up to 1.6 times as many bytes. Spark's own writer looks at
    the first page of a column instead, and needs no such list.
    """
    paths = []
    for field in schema:
        is_list = pa.types.is_list(field.type)
        of = field.type.value_type if is_list else field.type
        if pa.types.is_string(of) or pa.types.is_large_string(of):
            paths.append(f"{field.name}.list.element" if is_list else field.name)
    return paths
