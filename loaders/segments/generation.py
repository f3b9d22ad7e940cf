"""Build base generations: immutable LMDB environments that contain all rows of a view.

A generation is built in a directory of its own, chunk by chunk. Each chunk is on the disk before the next chunk begins,
so an interrupted build resumes at the chunk where it stopped. Only a complete generation gets its final name, and only
then may the catalog refer to it.
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

from shoal.engine.base.errors import FileDamaged, StoreDamaged
from shoal.engine.base.failpoints import reached
from shoal.engine.format.catalog import LowWatermark, Origin, SegmentRecord, chunk_key
from shoal.engine.format.layout import RowLayout
from shoal.engine.format.paths import DATA, generation_path, generations_path
from shoal.engine.format.schema import ViewSchema
from shoal.engine.root.directory_storage import sync_directory
from shoal.engine.store.disk import make_directory, store_full_named
from shoal.engine.store.environment import map_generation
from shoal.engine.store.segment import Chunk, Segment
from shoal.loaders.segments.arrow_rows import encode
from shoal.loaders.segments.environment_file import (
    FIRST_VALUE,
    MAX_VALUE_BYTES,
    EnvironmentFile,
    StoredValue,
    next_value,
)
from shoal.loaders.segments.low_watermark import rows_with_own_age
from shoal.loaders.segments.published_rows import EntryReader, RowGroup
from shoal.loaders.segments.segment_writer import ChunkBuilder, ChunkMemory

CHUNK_BYTES = 64 << 20
"""The approximate size of a chunk in bytes, including its variable-length values."""

_BUILDING = ".building-"
_FOLD = "-fold-"

Progress = Callable[[int], None]
"""A callback that receives the number of rows written since its last call."""


@dataclass(frozen=True)
class StoredChunk:
    """A chunk of a generation, with its offset in the file and its size in bytes. `rows` includes tombstones."""

    rows: int
    offset: int
    size: int
    max_hash: int
    tombstones: int = 0
    pushed: int = 0


class GenerationBuilder:
    """A generation that is being built, in a directory of its own next to the generation's final path.

    If the generation was completed before, but the catalog does not name it, its build is resumed.
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
        """Append a chunk; when this returns, the chunk is on the disk.

        Raises:
            StoreFull: the disk has no room; no part of the chunk is left.
            FileDamaged: the chunk is too large, or its first hash is not above the last hash of the chunk before it.
        """
        tombstones = chunk.tombstones
        pushed = chunk.pushed
        value = chunk.finish()
        first = int(chunk.hashes[0])
        last = int(chunk.hashes[-1])
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
        """Return the record of a base that consists of all chunks so far; arguments as in `SegmentRecord`."""
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
        """Return all chunks so far as a segment for lookups. Call this only before the generation gets its final
        name."""
        content = map_generation(self._building)
        return Segment(record, [Chunk(content[chunk.offset :], f"{self._building}") for chunk in self.chunks])

    def complete(self) -> None:
        """Give the generation its final name, so that the catalog can refer to it.

        Call this only while no other commit can happen: each commit removes the generations that the catalog does not
        name.
        """
        with store_full_named(self.path):
            self._file.finish()
            sync_directory(self._building)
            reached("base.finished")
            os.rename(self._building, self.path)
            sync_directory(self.path.parent)
        reached("base.renamed")

    def discard(self) -> None:
        """Remove the files of the build, unless the generation was completed."""
        shutil.rmtree(self._building, ignore_errors=True)


def _chunks_on_disk(building: Path) -> list[StoredChunk]:
    """Return the complete chunks that an interrupted build left.

    Each chunk was on the disk before the next chunk began, so only the last one may be incomplete. Only builds of
    snapshots are resumed; their chunks contain neither tombstones nor pushed rows.
    """
    found: list[tuple[int, Chunk]] = []
    with suppress(StoreDamaged):  # StoreDamaged ends the loop: no chunk follows the last one.
        content = map_generation(building)
        offset = FIRST_VALUE
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
    """Write all rows of a snapshot, resuming after the chunks that the builder already has.

    Raises:
        FileDamaged: a file does not match its manifest.
        StoreFull: the disk has no room; free some room and call this again to resume.
    """
    layout = RowLayout(reader.manifest.view)
    groups = reader.row_groups()
    written = sum(chunk.rows for chunk in builder.chunks)
    progress(written)
    ends = itertools.accumulate(group.rows for group in groups)
    remaining = [group for group, end in zip(groups, ends, strict=True) if end > written]
    # Use two memories in turn, so that one chunk is written to the disk while the next chunk is encoded.
    memories = itertools.cycle((ChunkMemory(), ChunkMemory()))
    # Always close the reader here. Otherwise the garbage collector would close the reader at an arbitrary place in the
    # code. There it would wait for the reader's thread, even if threads cannot end at that place.
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
    """Write a batch with `encode`; raise FileDamaged, naming the file, if a value does not fit."""
    try:
        encode(chunk, row, batch, own_age=rows_with_own_age(reader.manifest, batch))
    except ValueError as error:
        raise FileDamaged(f"{reader.root.where(reader.manifest, group.file)}: {error}") from error


def chunk_plans(groups: Iterable[RowGroup], row_bytes: int) -> list[list[RowGroup]]:
    """Return the row groups of each chunk, in order. A chunk has at least CHUNK_BYTES bytes; only the last one may be
    smaller."""
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
    """Yield the batches of row groups in order, and read the next batch while the caller works on the current one."""
    with ThreadPoolExecutor(1) as pool:
        following = None
        for group in groups:
            current = following
            following = pool.submit(read, group)
            if current is not None:
                yield current.result()
        if following is not None:
            yield following.result()


def fold_id(seq: int) -> str:
    """Return a new id for a generation that this node builds from all rows that a view has at `seq`."""
    return f"{seq:012d}{_FOLD}{uuid.uuid4().hex[:8]}"


def is_fold(generation_id: str) -> bool:
    """Return whether a generation was built on this node and is therefore not a published snapshot."""
    return _FOLD in generation_id


def clear_unfinished(store: Path, view: str, *, but: str) -> None:
    """Remove the unfinished builds of a view's snapshots, because nobody will resume them. Keep the build of `but`."""
    for entry in _unfinished(generations_path(store, view)):
        if entry.name != _BUILDING + but and not is_fold(entry.name):
            shutil.rmtree(entry)


def clear_dead_folds(store: Path, view: str) -> None:
    """Remove the unfinished folds that a dead writer left for a view. Call this before a new writer begins a fold."""
    for entry in _unfinished(generations_path(store, view)):
        if is_fold(entry.name):
            shutil.rmtree(entry)


def _unfinished(directory: Path) -> list[Path]:
    return list(directory.glob(f"{_BUILDING}*")) if directory.is_dir() else []
