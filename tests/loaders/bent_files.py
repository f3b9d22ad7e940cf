"""Damage published Parquet files and pushed Arrow streams at random, and read them.

    python -m tests.loaders.bent_files parquet|arrow SEED EXAMPLES

The parsers are written in C++ and may crash the process. The last printed line is therefore the number of the example
that is being tried. Checksums are updated to match, so that the parser itself must find the damage.
"""

import random
import resource
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shoal.engine.base.errors import FileDamaged, PushInvalid, RequestTooLarge
from shoal.engine.format.layout import RowLayout
from shoal.engine.push.pushed_rows import deserialize_rows, pushed_rows, serialize_rows
from shoal.engine.root.export_root import ExportRoot, file_checksum
from shoal.engine.root.manifest import Manifest
from shoal.engine.server.arrow_pushes import arrow_columns
from shoal.loaders.segments.generation import encode_published
from shoal.loaders.segments.published_rows import EntryReader
from shoal.loaders.segments.segment_writer import ChunkBuilder
from tests import stores
from tests.engine import segments
from tests.every_type import ITEMS, item_rows

MOST_MEMORY = 2 << 30
"""The memory limit in bytes. No valid example needs this much. An example that exceeds it trusts a size in a damaged
file."""

COMPRESSIONS = ("none", "snappy", "gzip", "zstd", "lz4")
TYPES: list[pa.DataType] = [
    pa.int8(),
    pa.int64(),
    pa.float16(),
    pa.float64(),
    pa.string(),
    pa.large_string(),
    pa.binary(6),
]
TYPES += [pa.bool_(), pa.null(), pa.timestamp("ns"), pa.timestamp("s", "UTC"), pa.date32(), pa.decimal128(9, 2)]
TYPES += [pa.list_(pa.int64()), pa.list_(pa.null()), pa.large_list(pa.string()), pa.struct({"a": pa.int8()})]
TYPES += [pa.dictionary(pa.int8(), pa.string()), pa.list_(pa.float32(), 3), pa.string_view()]


def bend(source: random.Random, content: bytes) -> bytes:
    """Return the content with some bytes flipped, replaced, removed or inserted, more often near the footer."""
    data = bytearray(content)
    for _ in range(source.choice([1, 1, 2, 5, 20])):
        near_end = source.random() < 0.5
        at = len(data) - 1 - source.randrange(min(3000, len(data))) if near_end else source.randrange(len(data))
        match source.randrange(6):
            case 0 | 1 | 2:
                data[at] ^= 1 << source.randrange(8)
            case 3:
                data[at : at + 4] = source.choice([b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\xff" * 4, source.randbytes(4)])
            case 4:
                del data[at : at + source.randrange(1, 9)]
            case _:
                data[at:at] = source.randbytes(source.randrange(1, 9))
        if len(data) < 8:
            return bytes(content[:8])
    return bytes(data) if source.random() < 0.9 else bytes(data[: source.randrange(1, len(data))])


def other_column(source: random.Random, table: pa.Table) -> pa.Table:
    """Return the table with one column cast to another type, renamed, removed or duplicated."""
    index = source.randrange(table.num_columns)
    target = source.choice(TYPES)
    name = table.schema.names[index]
    match source.randrange(4):
        case 0:
            return table.remove_column(index)
        case 1:
            return table.append_column(name, table.column(index))
        case 2:
            return table.set_column(index, "other", table.column(index))
        case _:
            try:
                column = table.column(index).cast(target, safe=False)
            except pa.ArrowException:
                column = pa.nulls(table.num_rows, target)
            return table.set_column(index, name, column)


class Parquet:
    """A published delta with one file, which is damaged."""

    refusals = (FileDamaged,)

    def __init__(self, directory: Path) -> None:
        self.root = ExportRoot(directory / "root")
        tombstones = [{"items_id": "gone"}]
        self.manifest = stores.publish_delta(self.root, ITEMS, item_rows(40), tombstones, files=1)
        self.path = self.root.directory(self.manifest) / self.manifest.files[0].path
        self.table = pq.read_table(self.path)
        self.written = self.path.read_bytes()

    def prepare(self, source: random.Random) -> None:
        content = self.written
        if source.random() < 0.5:
            table = other_column(source, self.table) if source.random() < 0.5 else self.table
            sink = pa.BufferOutputStream()
            how: dict[str, Any] = {"compression": source.choice(COMPRESSIONS), "row_group_size": source.choice([7, 99])}
            how |= {"use_dictionary": source.random() < 0.5, "data_page_version": source.choice(["1.0", "2.0"])}
            try:
                pq.write_table(table, sink, **how)
            except (pa.ArrowException, ValueError):
                return self.prepare(source)
            content = sink.getvalue().to_pybytes()
        self.path.write_bytes(bend(source, content) if source.random() < 0.8 else content)
        return None

    def read(self) -> None:
        file = self.manifest.files[0].model_copy(
            update={"bytes": self.path.stat().st_size, "checksum": file_checksum(self.path)}
        )
        reader = EntryReader(self.root, Manifest.model_validate(self.manifest.model_dump() | {"files": (file,)}))
        for group, batch in reader.batches():
            builder = ChunkBuilder(RowLayout(ITEMS), group.rows, with_origins=False)
            encode_published(builder, 0, batch, reader, group)
            builder.finish()


class Arrow:
    """A push as a client sends it, and as a worker forwards it to the writer."""

    refusals = (PushInvalid, RequestTooLarge)

    def __init__(self, directory: Path) -> None:
        rows = item_rows(20)
        identities = {(number, number): row for number, row in enumerate(rows)}
        self.view = segments.version(ITEMS, [segments.segment(ITEMS, identities)]).view("items")
        table = stores.published_table(ITEMS, rows, [], delta=False)
        self.table = table.select(["items_id", *(feature.name for feature in ITEMS.features)])
        self.body = b""
        self.for_writer = False

    def prepare(self, source: random.Random) -> None:
        self.for_writer = source.random() < 0.2
        table = other_column(source, self.table) if source.random() < 0.4 else self.table
        if self.for_writer:
            content = serialize_rows(table.to_batches())
        else:
            sink = pa.BufferOutputStream()
            options = pa.ipc.IpcWriteOptions(compression=source.choice([None, None, "lz4", "zstd"]))
            with pa.ipc.new_stream(sink, table.schema, options=options) as stream:
                stream.write_table(table, max_chunksize=source.choice([5, 100]))
            content = sink.getvalue().to_pybytes()
        self.body = bend(source, content) if source.random() < 0.8 else content

    def read(self) -> None:
        if self.for_writer:
            deserialize_rows(self.body)
            return
        columns = arrow_columns(self.body, max_rows=1000, max_bytes=1 << 20)
        batch = pushed_rows(self.view, columns, now=datetime.now(UTC))
        batch.validate(full=True)


def main() -> None:
    what = sys.argv[1]
    seed = int(sys.argv[2])
    count = int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))
    directory = Path(tempfile.mkdtemp())
    kinds: dict[str, Callable[[Path], Parquet | Arrow]] = {"parquet": Parquet, "arrow": Arrow}
    outcomes: Counter[str] = Counter()
    try:
        trial = kinds[what](directory)
        for number in range(seed, seed + count):
            print(f"example {number}", flush=True)
            trial.prepare(random.Random(number))
            try:
                trial.read()
                outcomes["read"] += 1
            except trial.refusals as error:
                str(error).encode()
                outcomes["refused"] += 1
    finally:
        shutil.rmtree(directory)
    print(dict(outcomes), flush=True)


if __name__ == "__main__":
    main()
