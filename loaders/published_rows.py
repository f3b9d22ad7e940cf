"""Read the rows of a published entry, believing nothing: checksums, schema, counts, order and key identity are checked.

Everything downstream may rely on what comes from here. A shard reads only its own rows: files that have none of them
are not opened, and of those that lie across its ends the key hashes tell how many are.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from engine.errors import FileDamaged
from engine.export_root import ExportRoot
from engine.kernels.hashing import key_hashes
from engine.keys import KEY_HASH, KEY_HASH_2
from engine.manifest import EVENT_TIMESTAMP, TOMBSTONE, Manifest, PublishedFile
from engine.shards import Shard
from engine.times import ALLOWED_YEARS, FURTHEST_AHEAD, later_than, outside_range, shown_time, to_datetime, to_micros
from loaders.arrow_rows import published_schema

_UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError)
"""What pyarrow raises of a file that is no Parquet: the last of these of names of columns."""


@dataclass(frozen=True)
class RowGroup:
    """One row group of one file of an entry: `rows` of its `total` are to be read; `bytes` is what their values take,
    before compression."""

    file: PublishedFile
    number: int
    total: int
    rows: int
    bytes: int


@dataclass
class EntryReader:
    """The rows of one entry, or those of a shard, read once, in the order of their hashes, from any row group on. A
    file's checksum is checked when it is first opened."""

    root: ExportRoot
    manifest: Manifest
    shard: Shard | None = None
    _open: dict[str, pq.ParquetFile] = field(default_factory=dict)
    _last_hash: int | None = None

    @property
    def files(self) -> list[PublishedFile]:
        """The files that may have rows to read."""
        if self.shard is None:
            return list(self.manifest.files)
        return [file for file in self.manifest.files if self.shard.touches(file.min_key_hash, file.max_key_hash)]

    def row_groups(self) -> list[RowGroup]:
        """All row groups with rows to read, in order; raises FileDamaged where a file's footer is not what the manifest
        says."""
        return [group for file in self.files for group in self._row_groups(file) if group.rows]

    def _row_groups(self, file: PublishedFile) -> list[RowGroup]:
        path, groups = self.root.where(self.manifest, file), []
        with self.root.open_file(self.manifest, file) as stream:
            try:
                parquet = pq.ParquetFile(stream)
                metadata = parquet.metadata
                if metadata.num_rows != file.rows:
                    raise FileDamaged(f"{path} has {metadata.num_rows} rows, its manifest says {file.rows}")
                for number in range(metadata.num_row_groups):
                    group = metadata.row_group(number)
                    rows = self._rows_inside(parquet, number, file, path)
                    share = rows / group.num_rows if group.num_rows else 0
                    size = int(group.total_byte_size * share)
                    groups.append(RowGroup(file, number, group.num_rows, rows, size))
            except _UNREADABLE as error:
                raise FileDamaged(f"{path} is not readable as Parquet: {error}") from error
        return groups

    def _rows_inside(self, parquet: pq.ParquetFile, number: int, file: PublishedFile, path: str) -> int:
        """How many rows of a row group are to be read, by its hashes as they stand there: `read` checks them."""
        rows: int = parquet.metadata.row_group(number).num_rows
        if self.shard is None or self.shard.holds_all(file.min_key_hash, file.max_key_hash):
            return rows
        column = parquet.read_row_group(number, columns=[KEY_HASH])
        if column.num_columns != 1 or column.schema.field(0).type != pa.int64() or column.column(0).null_count:
            raise FileDamaged(f"{path} has not one column {KEY_HASH!r} of int64 without nulls")
        return int(self.shard.rows_inside(column.column(0).to_numpy()).sum())

    def read(self, group: RowGroup) -> pa.RecordBatch:
        """One row group as a batch with the columns of `published_schema`.

        Raises:
            FileDamaged: anything about it differs from what the manifest and the contract say.
        """
        path = self.root.where(self.manifest, group.file)
        wanted = published_schema(self.manifest.view, delta=self.manifest.kind == "delta")
        try:
            table = self._file(group.file).read_row_group(group.number, columns=wanted.names)
            batch = _conform(table, wanted, path)
        except _UNREADABLE as error:
            raise FileDamaged(f"{path}: row group {group.number} cannot be read: {error}") from error
        if batch.num_rows != group.total:
            raise FileDamaged(
                f"{path}: row group {group.number} has {batch.num_rows} rows, its footer says {group.total}"
            )
        self._check_times(batch, group, path)
        self._check(batch, group, path)
        return batch if group.rows == group.total else self._inside(batch, group, path)

    def _inside(self, batch: pa.RecordBatch, group: RowGroup, path: str) -> pa.RecordBatch:
        assert self.shard is not None
        batch = batch.filter(pa.array(self.shard.rows_inside(batch.column(KEY_HASH).to_numpy())))
        if batch.num_rows != group.rows:
            raise FileDamaged(f"{path}: row group {group.number} changed while it was being read")
        return batch

    def batches(self) -> Iterator[tuple[RowGroup, pa.RecordBatch]]:
        """All rows; raises FileDamaged at the end if more or fewer are tombstones than the manifest says. Where rows
        are left out, of which it does not say how many are, no more must be."""
        tombstones = rows = 0
        for group in self.row_groups():
            batch = self.read(group)
            if self.manifest.kind == "delta":
                tombstones += batch.column(TOMBSTONE).true_count
            rows += batch.num_rows
            yield group, batch
        has_all = rows == self.manifest.rows + self.manifest.tombstones
        if tombstones > self.manifest.tombstones or (has_all and tombstones < self.manifest.tombstones):
            raise FileDamaged(
                f"{self.root.where(self.manifest)} has {tombstones} tombstones, its manifest says "
                f"{self.manifest.tombstones}"
            )

    def _file(self, file: PublishedFile) -> pq.ParquetFile:
        if file.path not in self._open:
            stream = self.root.checked_file(self.manifest, file)
            self._open.clear()
            # By its descriptor: what was checked is what is read, and no read goes by way of Python.
            with stream:
                self._open[file.path] = pq.ParquetFile(f"/proc/self/fd/{stream.fileno()}")
        return self._open[file.path]

    def _check_times(self, batch: pa.RecordBatch, group: RowGroup, path: str) -> None:
        for name in self._times:
            outside = outside_range(batch.column(name))
            if outside is not None:
                row, time = outside
                keys = ", ".join(f"{key.name} {batch.column(key.name)[row]}" for key in self.manifest.view.join_keys)
                raise FileDamaged(
                    f"{path}: column {name!r} holds {shown_time(time)} in row {row} of row group {group.number}, which "
                    f"has {keys}; a time must be in {ALLOWED_YEARS}: correct the source and export the view with --full"
                )

        if self.manifest.format_version == 1 or self.manifest.view.future == "allow":
            return  # Exporters of format 1 did not keep to this.
        latest = to_datetime(to_micros(self.manifest.published_at) + FURTHEST_AHEAD // timedelta(microseconds=1))
        ahead = later_than(batch.column(EVENT_TIMESTAMP), latest)
        if ahead is not None:
            row, time = ahead
            raise FileDamaged(
                f"{path}: row {row} of row group {group.number} has the event time {shown_time(time)}, more than a day "
                f"after its publication; correct the source, or give the view `future: allow`, and export with --full"
            )

    @property
    def _times(self) -> list[str]:
        """The columns of timestamps."""
        features = self.manifest.view.features
        return [EVENT_TIMESTAMP, *(feature.name for feature in features if feature.type == "timestamp")]

    def _check(self, batch: pa.RecordBatch, group: RowGroup, path: str) -> None:
        tombstones = np.zeros(batch.num_rows, np.bool_)
        if self.manifest.kind == "delta":
            tombstones = batch.column(TOMBSTONE).to_numpy(zero_copy_only=False)
        first, second = (batch.column(name).to_numpy() for name in (KEY_HASH, KEY_HASH_2))
        same = first[1:] == first[:-1]
        if np.any(first[1:] < first[:-1]) or np.any(same & (second[1:] <= second[:-1])):
            raise FileDamaged(f"{path}: its rows are not in the order of their hashes, or a key stands twice")
        if self._last_hash is not None and first[0] <= self._last_hash:
            # Each row group may become a chunk, and a hash is looked for in one chunk only.
            raise FileDamaged(f"{path}: row group {group.number} does not begin behind the hash that the last ended at")
        self._last_hash = int(first[-1])
        if first[0] < group.file.min_key_hash or first[-1] > group.file.max_key_hash:
            raise FileDamaged(f"{path}: it holds a key hash outside the range that its manifest says")
        alive = pa.array(~tombstones)
        keys = [batch.column(key.name) for key in self.manifest.view.join_keys]
        if tombstones.any():
            keys = [column.filter(alive) for column in keys]
        for key, column in zip(self.manifest.view.join_keys, keys, strict=True):
            if column.null_count:
                raise FileDamaged(f"{path}: join key {key.name!r} is null in {column.null_count} rows")
        expected = key_hashes(keys)
        if np.any(expected[0] != first[~tombstones]) or np.any(expected[1] != second[~tombstones]):
            raise FileDamaged(f"{path}: a key's hashes are not those of its key; it was written by something else")


def _conform(table: pa.Table, wanted: pa.Schema, path: str) -> pa.RecordBatch:
    for column in wanted:
        columns = len(table.schema.get_all_field_indices(column.name))
        if columns != 1:
            raise FileDamaged(
                f"{path} has {columns or 'no'} column {column.name!r}, which its manifest lists as {column.type}"
            )
        found = table.schema.field(column.name).type
        if not _same_type(found, column.type):
            raise FileDamaged(f"{path}: column {column.name!r} is {found}, its manifest says {column.type}")
    batches = table.select(wanted.names).cast(wanted).combine_chunks().to_batches()
    if len(batches) != 1:
        raise FileDamaged(f"{path}: a column of one row group takes more than 2 GiB; write smaller row groups")
    batch = batches[0]
    batch.validate(full=True)
    for name in (KEY_HASH, KEY_HASH_2, EVENT_TIMESTAMP, TOMBSTONE):
        if name in wanted.names and batch.column(name).null_count:
            raise FileDamaged(f"{path}: column {name!r} has nulls")
    return batch


def _same_type(found: pa.DataType, wanted: pa.DataType) -> bool:
    if pa.types.is_list(wanted):
        any_list = pa.types.is_list(found) or pa.types.is_fixed_size_list(found)
        return any_list and _same_type(found.value_type, wanted.value_type)
    if pa.types.is_timestamp(wanted):
        return pa.types.is_timestamp(found) and found.tz is not None
    return bool(found == wanted)
