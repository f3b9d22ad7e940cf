"""Build base generations: immutable LMDB environments that hold all rows of a view.

A generation is built aside, chunk by chunk, each on disk before the next is begun: a build that died goes on with the
chunk that it died in. Only a complete one gets its name, and only then may the catalog mention it.
"""

import itertools
import os
import shutil
import uuid
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa

from engine.catalog import LowWatermark, Origin, SegmentRecord, chunk_key
from engine.directory_storage import sync_directory
from engine.environment import (
    DATA,
    generation_path,
    generations_path,
    make_directory,
    map_generation,
    store_full_named,
)
from engine.errors import FileDamaged, StoreDamaged
from engine.failpoints import reached
from engine.layout import RowLayout
from engine.schema import ViewSchema
from engine.segment import Chunk, Segment
from loaders.arrow_rows import encode
from loaders.environment_file import FIRST_VALUE, MAX_VALUE_BYTES, EnvironmentFile, StoredValue, next_value
from loaders.low_watermark import rows_with_own_age
from loaders.published_rows import EntryReader, RowGroup
from loaders.segment_writer import ChunkBuilder, ChunkMemory

CHUNK_BYTES = 64 << 20
"""Rows are cut into chunks of about so many bytes, their variable-length values included."""

_BUILDING = ".building-"
_FOLD = "-fold-"

Progress = Callable[[int], None]
"""Told how many more rows were written."""


@dataclass(frozen=True)
class StoredChunk:
    """A chunk of a generation, and where it begins in the file. `rows` counts tombstones too."""

    rows: int
    offset: int
    size: int
    max_hash: int
    tombstones: int = 0
    pushed: int = 0


class GenerationBuilder:
    """A generation in the making, in a directory of its own beside its later place.

    One that was completed, but that the catalog did not come to name, is taken up again.
    """

    def __init__(self, store: Path, view: str, generation_id: str) -> None:
        self.path = generation_path(store, view, generation_id)
        self.id = generation_id
        self._building = self.path.with_name(_BUILDING + generation_id)
        with store_full_named(self.path):
            if self.path.exists():
                os.rename(self.path, self._building)
            make_directory(self._building)
            self.chunks = _chunks_on_disk(self._building)
            keys = (chunk_key(generation_id, number) for number in itertools.count())
            values = [StoredValue(key, chunk.offset, chunk.size) for key, chunk in zip(keys, self.chunks, strict=False)]
            self._file = EnvironmentFile(self._building / DATA, values)
        reached("base.begun")

    def add(self, chunk: ChunkBuilder) -> None:
        """Append a chunk; when this returns it is on disk.

        Raises:
            StoreFull: the disk has no room; nothing of the chunk is left.
        """
        tombstones, pushed = chunk.tombstones, chunk.pushed
        value, first, last = chunk.finish(), int(chunk.hashes[0]), int(chunk.hashes[-1])
        if self.chunks and first <= self.chunks[-1].max_hash:
            raise FileDamaged(f"{self.path}: two chunks share a first hash; export with another number of shards")
        if value.size > MAX_VALUE_BYTES:
            raise FileDamaged(f"{self.path}: a chunk takes {value.size} bytes; write row groups of less than 4 GiB")
        with store_full_named(self.path):
            offset = self._file.append(chunk_key(self.id, len(self.chunks)), value)
        reached("base.chunk-written")
        self.chunks.append(StoredChunk(chunk.rows, offset, value.size, last, tombstones, pushed))

    def record(
        self,
        schema: ViewSchema,
        origins: tuple[Origin, ...],
        *,
        first_seq: int,
        last_seq: int,
        last_entry: str,
        watermark: datetime | None,
        low_watermark: LowWatermark | None = None,
    ) -> SegmentRecord:
        """The record of the base that all chunks so far make up; the arguments as in `SegmentRecord`."""
        return SegmentRecord(
            id=self.id,
            view_schema=schema,
            origins=origins,
            first_seq=first_seq,
            last_seq=last_seq,
            last_entry=last_entry,
            chunks=len(self.chunks),
            offsets=tuple(chunk.offset for chunk in self.chunks),
            rows=sum(chunk.rows - chunk.tombstones for chunk in self.chunks),
            tombstones=sum(chunk.tombstones for chunk in self.chunks),
            pushed=sum(chunk.pushed for chunk in self.chunks),
            bytes=sum(chunk.size for chunk in self.chunks),
            watermark=watermark,
            low_watermark=low_watermark,
            created_at=datetime.now(UTC),
        )

    def segment(self, record: SegmentRecord) -> Segment:
        """All chunks so far as a segment to look up in, while the generation has no name yet."""
        content = map_generation(self._building)
        return Segment(record, [Chunk(content[chunk.offset :], f"{self._building}") for chunk in self.chunks])

    def complete(self) -> None:
        """Give the generation its name, for the catalog to refer to; to be called while no other commit can happen, as
        each removes what the catalog does not name."""
        with store_full_named(self.path):
            self._file.finish()
            sync_directory(self._building)
            reached("base.finished")
            os.rename(self._building, self.path)
            sync_directory(self.path.parent)
        reached("base.renamed")

    def discard(self) -> None:
        """Remove what was built, unless it was completed."""
        shutil.rmtree(self._building, ignore_errors=True)


def _chunks_on_disk(building: Path) -> list[StoredChunk]:
    """The chunks that a build left. Each was on disk before its successor was begun: only the last may be there in
    part. Only builds of snapshots go on, which hold neither tombstones nor pushed rows."""
    found: list[tuple[int, Chunk]] = []
    with suppress(StoreDamaged):  # This is how it ends: behind the last chunk there is none.
        content, offset = map_generation(building), FIRST_VALUE
        while True:
            chunk = Chunk(content[offset:], f"{building} at {offset}")
            found.append((offset, chunk))
            offset = next_value(offset, chunk.header.total)
    while found and not _is_whole(found[-1][1]):
        found.pop()
    return [StoredChunk(chunk.header.rows, at, chunk.header.total, chunk.header.max_hash) for at, chunk in found]


def _is_whole(chunk: Chunk) -> bool:
    try:
        chunk.verify()
    except StoreDamaged:
        return False
    return True


def build_from_entry(builder: GenerationBuilder, reader: EntryReader, progress: Progress) -> None:
    """Write all rows of a snapshot, going on where the builder stands.

    Raises:
        FileDamaged: a file is not what its manifest says.
        StoreFull: the disk has no room; freeing some and calling again goes on.
    """
    layout = RowLayout(reader.manifest.view)
    groups = reader.row_groups()
    written = sum(chunk.rows for chunk in builder.chunks)
    progress(written)
    ends = itertools.accumulate(group.rows for group in groups)
    remaining = [group for group, end in zip(groups, ends, strict=True) if end > written]
    # Of two: a chunk goes to the disk while its successor is encoded.
    memories = itertools.cycle((ChunkMemory(), ChunkMemory()))
    # Whatever happens, reading ends here and now: if it were left to the collector of garbage, that would wait for a
    # thread wherever it happens to be, even where threads cannot end.
    with closing(read_ahead(reader.read, remaining)) as batches, ThreadPoolExecutor(1) as writing:
        before: Future[None] | None = None
        for plan, memory in zip(chunk_plans(remaining, layout.stride + 8), memories, strict=False):
            chunk = ChunkBuilder(layout, sum(group.rows for group in plan), with_origins=False, memory=memory)
            row = 0
            for group in plan:
                batch = next(batches)
                encode_published(chunk, row, batch, reader, group)
                row += batch.num_rows
                progress(batch.num_rows)
            if before is not None:
                before.result()
            before = writing.submit(builder.add, chunk)
        if before is not None:
            before.result()


def encode_published(
    chunk: ChunkBuilder, row: int, batch: pa.RecordBatch, reader: EntryReader, group: RowGroup
) -> None:
    """`encode`, with a misfit named as damage of its file."""
    try:
        encode(chunk, row, batch, own_age=rows_with_own_age(reader.manifest, batch))
    except ValueError as error:
        raise FileDamaged(f"{reader.root.where(reader.manifest, group.file)}: {error}") from error


def chunk_plans(groups: Iterable[RowGroup], row_bytes: int) -> list[list[RowGroup]]:
    """Row groups gathered into chunks of at least CHUNK_BYTES (but for the last), in order."""
    plans: list[list[RowGroup]] = []
    size = CHUNK_BYTES
    for group in groups:
        if size >= CHUNK_BYTES:
            plans.append([])
            size = 0
        plans[-1].append(group)
        size += max(row_bytes * group.rows, group.bytes)
    return plans


def read_ahead(
    read: Callable[[RowGroup], pa.RecordBatch], groups: Iterable[RowGroup]
) -> Generator[pa.RecordBatch, None, None]:
    """The batches of row groups in order, the next one being read while its forerunner is worked on."""
    with ThreadPoolExecutor(1) as pool:
        following = None
        for group in groups:
            current, following = following, pool.submit(read, group)
            if current is not None:
                yield current.result()
        if following is not None:
            yield following.result()


def fold_id(seq: int) -> str:
    """A new id for the generation that holds all of a view's rows as of `seq`, made on this node."""
    return f"{seq:012d}{_FOLD}{uuid.uuid4().hex[:8]}"


def is_fold(generation_id: str) -> bool:
    """Whether a generation was made on this node, and is no snapshot that anybody published."""
    return _FOLD in generation_id


def clear_unfinished(store: Path, view: str, *, but: str) -> None:
    """Remove builds of a view's snapshots that nobody will resume: all but that of one generation."""
    for entry in _unfinished(generations_path(store, view)):
        if entry.name != _BUILDING + but and not is_fold(entry.name):
            shutil.rmtree(entry)


def clear_dead_folds(store: Path, view: str) -> None:
    """Remove the folds of a view that a writer left when it died; to be called before a new one begins any."""
    for entry in _unfinished(generations_path(store, view)):
        if is_fold(entry.name):
            shutil.rmtree(entry)


def _unfinished(directory: Path) -> list[Path]:
    return list(directory.glob(f"{_BUILDING}*")) if directory.is_dir() else []
