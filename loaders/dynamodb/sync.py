"""Bring a view's table up to date with an export root: snapshots, then deltas. Only changed rows are written.

After all rows of an entry are written, the progress is recorded in the table itself. If a process dies, an entry may be
partly written. The next process writes all rows of that entry again, with the same result.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from time import monotonic
from typing import Any

import numpy as np
import numpy.typing as npt

from shoal.engine.base.errors import (
    FileDamaged,
    LineageError,
    ManifestInvalid,
    NotPublished,
    TableMissing,
)
from shoal.engine.base.failpoints import reached
from shoal.engine.dynamodb.client import DynamoClient, binary_of
from shoal.engine.dynamodb.items import KEY, ROW_HASH
from shoal.engine.format.catalog import ViewRecord
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.root.manifest import Manifest
from shoal.loaders.dynamodb.lease import Lease
from shoal.loaders.dynamodb.rows import Row, published_rows
from shoal.loaders.dynamodb.table import Pace, Progress, Table, WriteCosts
from shoal.loaders.follow.plan import ApplyDelta, LoadSnapshot, fallback_snapshot, next_step
from shoal.loaders.follow.recurring import RecurringFailures
from shoal.loaders.segments.published_rows import EntryReader

log = logging.getLogger("shoal.sync")


@dataclass(frozen=True)
class Written:
    """An entry that was written to a table, or in a dry run would be written. `unchanged` counts the rows of a snapshot
    that the table already had."""

    view: str
    table: str
    kind: str
    seq: int
    puts: int
    deletes: int
    superseded: int
    unchanged: int
    estimated_units: int
    write_units: float
    read_units: float
    retries: int
    seconds: float


class Known:
    """The rows of a table: their keys, the hashes of their values, and whether the snapshot that is being written has
    the same key."""

    def __init__(self, keys: bytes, hashes: bytes) -> None:
        both = np.frombuffer(keys, np.int64).reshape(-1, 2)
        order = np.lexsort((both[:, 1], both[:, 0]))
        self._first = both[order, 0]
        self._second = both[order, 1]
        self._hashes = np.frombuffer(hashes, np.uint64)[order]
        self._seen = np.zeros(order.size, np.bool_)

    def unlike(self, rows: list[Row]) -> list[Row]:
        """Return those rows of a snapshot that the table lacks, or holds with another value."""
        both = np.frombuffer(b"".join(row.key for row in rows), np.int64).reshape(-1, 2)
        place = np.searchsorted(self._first, both[:, 0])
        hashes = np.frombuffer(b"".join(row.row_hash for row in rows), np.uint64)
        found = []
        for row, at, first, second, row_hash in zip(
            rows, place.tolist(), both[:, 0].tolist(), both[:, 1].tolist(), hashes.tolist(), strict=True
        ):
            while at < self._first.size and self._first[at] == first and self._second[at] != second:
                at += 1
            if at < self._first.size and self._first[at] == first:
                self._seen[at] = True
                if self._hashes[at] == row_hash:
                    continue
            found.append(row)
        return found

    def vanished(self) -> list[Row]:
        """Return tombstones for the keys of the table that the snapshot lacks."""
        gone: npt.NDArray[np.int64] = np.stack([self._first[~self._seen], self._second[~self._seen]], axis=1)
        raw = gone.tobytes()
        return [Row(raw[start : start + 16], 0) for start in range(0, len(raw), 16)]


class Sync:
    """Writes views of a root to their tables.

    Args:
        units_per_second: the maximum number of write units per second for each table.
        lease_seconds: the time after which the lease of a dead process expires.
        dry_run: count what would be written, and write nothing.
        create_tables: create missing tables.
    """

    def __init__(
        self,
        client: DynamoClient,
        root: ExportRoot,
        *,
        units_per_second: float,
        lease_seconds: float,
        dry_run: bool = False,
        create_tables: bool = False,
    ) -> None:
        self._client = client
        self._root = root
        self._units_per_second = units_per_second
        self._lease_seconds = lease_seconds
        self._dry_run = dry_run
        self._create_tables = create_tables
        self.failures = RecurringFailures(log)
        """The current failures, by view, table or root."""

    def remote_views(self) -> list[str]:
        """Return the views of the root that are kept in tables."""
        self._root.check_exists()
        return [view for view in self._root.views() if self._newest(view).view.is_remote]

    async def catch_up(self, view: str) -> list[Written]:
        """Write the entries of a view's log that its table lacks.

        Raises:
            NotPublished: the root does not have the view, or the view has no snapshot to start from.
            TableMissing: the table does not exist.
            TableFailed, TableTaken, TableInvalid: the table cannot be written to.
            FileDamaged, ManifestInvalid, LineageError: an entry cannot be applied; earlier entries were applied.
        """
        newest = await asyncio.to_thread(self._newest, view)
        if not newest.view.is_remote:
            raise NotPublished(
                f"view {view!r} in {self._root} is kept on each node; to sync it, set its tier to dynamodb"
            )
        table = Table(self._client, newest.view.table_name, Pace(self._units_per_second), self.failures)
        if self._dry_run:
            return await self._write_all(table, view)
        if self._create_tables and not await table.exists():
            await table.create()
        await table.check_key()
        if await asyncio.to_thread(self._step, view, await table.progress()) is None:
            return []
        async with Lease(self._client, table.name, self._lease_seconds) as table.lease:
            return await self._write_all(table, view)

    async def _write_all(self, table: Table, view: str) -> list[Written]:
        written = []
        try:
            progress = await table.progress()
        except TableMissing:
            if not self._dry_run:
                raise
            progress = None
        while (step := await asyncio.to_thread(self._step, view, progress)) is not None:
            table.spent = WriteCosts()
            try:
                entry = await self._write(table, step, progress)
            except (ManifestInvalid, FileDamaged, LineageError) as error:
                detour = await asyncio.to_thread(fallback_snapshot, self._root, view, step.manifest.seq, error)
                if detour is None:
                    raise
                entry = await self._write(table, detour, progress)
                step = detour
            manifest = step.manifest
            progress = Progress.at(manifest)
            written.append(entry)
            log.info(
                "%s: %s %d: %d puts, %d deletes, %d unchanged in %.1f s",
                table.name,
                entry.kind,
                entry.seq,
                entry.puts,
                entry.deletes,
                entry.unchanged,
                entry.seconds,
            )
        return written

    def _newest(self, view: str) -> Manifest:
        published = self._root.sequence_numbers(view)
        if not published:
            self._root.check_exists()
            raise NotPublished(f"{self._root} has no view {view!r}; it has {', '.join(self._root.views()) or 'none'}")
        return self._root.entry(view, published[-1])

    def _step(self, view: str, progress: Progress | None) -> LoadSnapshot | ApplyDelta | None:
        record = None
        if progress is not None:
            record = ViewRecord.model_construct(applied_seq=progress.seq, applied_entry=progress.entry)
        return next_step(self._root, view, record)

    async def _write(self, table: Table, step: LoadSnapshot | ApplyDelta, progress: Progress | None) -> Written:
        started = monotonic()
        manifest = step.manifest
        unchanged = 0
        if progress is not None:
            manifest.view.check_succeeds(progress.view)
        if not self._dry_run:
            await table.describe(manifest.view)
        if isinstance(step, LoadSnapshot):
            unchanged = await self._write_snapshot(table, manifest, is_first=progress is None)
        else:
            async for rows in self._rows(manifest):
                await self._put(table, rows, manifest, is_first=False)
        if not self._dry_run:
            await table.note(Progress.at(manifest))
            reached("sync.progress-noted")
        spent: dict[str, Any] = asdict(table.spent)
        return Written(
            view=manifest.view.name,
            table=table.name,
            kind=manifest.kind,
            seq=manifest.seq,
            unchanged=unchanged,
            seconds=monotonic() - started,
            **spent,
        )

    async def _write_snapshot(self, table: Table, manifest: Manifest, *, is_first: bool) -> int:
        """Write a snapshot's new and changed rows, and remove the table's other rows. Return the number of unchanged
        rows."""
        known = await self._known(table)
        unchanged = 0
        async for rows in self._rows(manifest):
            changed = known.unlike(rows)
            unchanged += len(rows) - len(changed)
            await self._put(table, changed, manifest, is_first=is_first)
        await self._put(table, known.vanished(), manifest, is_first=is_first)
        return unchanged

    async def _known(self, table: Table) -> Known:
        keys = bytearray()
        hashes = bytearray()
        try:
            async for page in table.scan((KEY, ROW_HASH)):
                for item in page:
                    keys += binary_of(item[KEY])
                    hashes += binary_of(item[ROW_HASH])
        except TableMissing:
            if not self._dry_run:
                raise
        return Known(bytes(keys), bytes(hashes))

    async def _put(self, table: Table, rows: list[Row], manifest: Manifest, *, is_first: bool) -> None:
        if self._dry_run:
            for row in rows:
                table.count(row, row.write_units(manifest.seq))
        elif is_first:
            await table.write_first(rows, manifest.seq)
        else:
            await table.write(rows, manifest.seq, replaces_all=manifest.kind == "snapshot")
        if rows:
            reached("sync.rows-written")

    async def _rows(self, manifest: Manifest) -> AsyncIterator[list[Row]]:
        """Yield the rows of an entry in batches."""
        reader = EntryReader(self._root, manifest)
        batches = reader.batches()
        while (following := await asyncio.to_thread(next, batches, None)) is not None:
            group, batch = following
            try:
                for rows in published_rows(manifest, batch):
                    yield rows
            except ValueError as error:
                raise FileDamaged(f"{self._root.where(manifest, group.file)}: {error}") from error
