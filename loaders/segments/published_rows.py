"""Read the rows of a published entry and check everything: checksums, schema, counts, order and key hashes.

Later code does not check these rows again. A store that holds a shard reads only the rows of that shard. It does not
open files that contain none of these rows. If only a part of a file belongs to the shard, the number of these rows
follows from the key hashes in the file.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shoal.engine.base.errors import FileDamaged
from shoal.engine.base.shards import Shard
from shoal.engine.base.system import descriptor_path
from shoal.engine.base.times import (
    ALLOWED_YEARS,
    FURTHEST_AHEAD,
    later_than,
    outside_range,
    shown_time,
    to_datetime,
    to_micros,
)
from shoal.engine.format.keys import KEY_HASH, KEY_HASH_2
from shoal.engine.kernels.hashing import key_hashes
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.root.manifest import EVENT_TIMESTAMP, TOMBSTONE, Manifest, PublishedFile
from shoal.loaders.segments.arrow_rows import published_schema

_UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError)
"""The errors that pyarrow raises for a file that is not valid Parquet; UnicodeDecodeError comes from column names."""


@dataclass(frozen=True)
class RowGroup:
    """One row group of one file of an entry. It has `total` rows, and the reader reads `rows` of them. `bytes` is the
    size of the values of the rows to read, before compression."""

    file: PublishedFile
    number: int
    total: int
    rows: int
    bytes: int


@dataclass
class EntryReader:
    """A reader of one entry. It reads all rows, or only the rows of a shard.

    Each row is read once, in the order of the hashes. The caller may begin at any row group. The checksum of a file is
    checked when the file is first opened.
    """

    root: ExportRoot
    manifest: Manifest
    shard: Shard | None = None
    _open: dict[str, pq.ParquetFile] = field(default_factory=dict)
    _last_hash: int | None = None

    @property
    def files(self) -> list[PublishedFile]:
        """The files that may contain rows to read."""
        if self.shard is None:
            return list(self.manifest.files)
        return [file for file in self.manifest.files if self.shard.touches(file.min_key_hash, file.max_key_hash)]

    def row_groups(self) -> list[RowGroup]:
        """Return all row groups with rows to read, in order.

        Raises:
            FileDamaged: a file cannot be read as Parquet, or its footer does not match the manifest.
        """
        return [group for file in self.files for group in self._row_groups(file) if group.rows]

    def _row_groups(self, file: PublishedFile) -> list[RowGroup]:
        path = self.root.where(self.manifest, file)
        groups = []
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
        """Return the number of rows to read from a row group, according to the key hashes in the file. `read` checks
        these hashes later."""
        rows: int = parquet.metadata.row_group(number).num_rows
        if self.shard is None or self.shard.holds_all(file.min_key_hash, file.max_key_hash):
            return rows
        column = parquet.read_row_group(number, columns=[KEY_HASH])
        if column.num_columns != 1 or column.schema.field(0).type != pa.int64() or column.column(0).null_count:
            raise FileDamaged(f"{path} must have exactly one column {KEY_HASH!r} of int64 without nulls")
        return int(self.shard.rows_inside(column.column(0).to_numpy()).sum())

    def read(self, group: RowGroup) -> pa.RecordBatch:
        """Return one row group as a batch with the columns of `published_schema`.

        Raises:
            FileDamaged: the row group differs from the manifest or from the format of published files.
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
        """Yield all row groups with their rows.

        Raises:
            FileDamaged: a row group is damaged, or the total number of tombstones differs from the manifest. A shard
                does not read all rows, and the manifest does not say how many tombstones belong to the shard. So a
                shard may read fewer tombstones than the manifest states, but not more.
        """
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
            # Open the file by its descriptor. pyarrow then reads the same file that was checked, and does not call
            # Python for each read.
            with stream:
                self._open[file.path] = pq.ParquetFile(descriptor_path(stream.fileno()))
        return self._open[file.path]

    def _check_times(self, batch: pa.RecordBatch, group: RowGroup, path: str) -> None:
        for name in self._times:
            outside = outside_range(batch.column(name))
            if outside is not None:
                row, time = outside
                keys = ", ".join(f"{key.name} {batch.column(key.name)[row]}" for key in self.manifest.view.join_keys)
                raise FileDamaged(
                    f"{path}: column {name!r} holds {shown_time(time)} in row {row} of row group {group.number} "
                    f"(key: {keys}); a time must be in {ALLOWED_YEARS}: correct the source and export the view "
                    f"with --full"
                )

        if self.manifest.format_version == 1 or self.manifest.view.future == "allow":
            return  # Exporters of format 1 did not enforce this limit.
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
        """The names of the timestamp columns."""
        features = self.manifest.view.features
        return [EVENT_TIMESTAMP, *(feature.name for feature in features if feature.type == "timestamp")]

    def _check(self, batch: pa.RecordBatch, group: RowGroup, path: str) -> None:
        tombstones = np.zeros(batch.num_rows, np.bool_)
        if self.manifest.kind == "delta":
            tombstones = batch.column(TOMBSTONE).to_numpy(zero_copy_only=False)
        first, second = (batch.column(name).to_numpy() for name in (KEY_HASH, KEY_HASH_2))
        same = first[1:] == first[:-1]
        if np.any(first[1:] < first[:-1]) or np.any(same & (second[1:] <= second[:-1])):
            raise FileDamaged(f"{path}: its rows are not in the order of their hashes, or a key occurs twice")
        if self._last_hash is not None and first[0] <= self._last_hash:
            # Each row group may become a chunk, and a lookup searches only one chunk for a hash.
            raise FileDamaged(
                f"{path}: row group {group.number} does not begin after the last hash of the row group before it"
            )
        self._last_hash = int(first[-1])
        if first[0] < group.file.min_key_hash or first[-1] > group.file.max_key_hash:
            raise FileDamaged(f"{path}: it contains a key hash outside the range in its manifest")
        alive = pa.array(~tombstones)
        keys = [batch.column(key.name) for key in self.manifest.view.join_keys]
        if tombstones.any():
            keys = [column.filter(alive) for column in keys]
        for key, column in zip(self.manifest.view.join_keys, keys, strict=True):
            if column.null_count:
                raise FileDamaged(f"{path}: join key {key.name!r} is null in {column.null_count} rows")
        expected = key_hashes(keys)
        if np.any(expected[0] != first[~tombstones]) or np.any(expected[1] != second[~tombstones]):
            raise FileDamaged(
                f"{path}: the key hashes of a row do not match its key; a program other than the exporter wrote it"
            )


def _conform(table: pa.Table, wanted: pa.Schema, path: str) -> pa.RecordBatch:
    for column in wanted:
        columns = len(table.schema.get_all_field_indices(column.name))
        if columns != 1:
            raise FileDamaged(
                f"{path} has {columns or 'no'} columns {column.name!r}, its manifest lists one of type {column.type}"
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
