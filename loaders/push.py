"""Apply pushed rows: each push as if it were alone, in the order of arrival, but all of a group in one commit.

A pushed row replaces the store's row of its key unless that is newer, by event time; features that a push lacks keep
the values that the store has. A group becomes one overlay, merged at once with as many of the newest ones as the tiers
ask for, so that many small commits leave few overlays.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import groupby
from typing import Any

import lmdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from engine.catalog import ViewRecord
from engine.errors import PushInvalid
from engine.failpoints import reached
from engine.kernels import gathering
from engine.layout import RowLayout
from engine.lookup import read_columns
from engine.manifest import TOMBSTONE
from engine.pushed_rows import check_takes_pushes, deleted_rows, pushed_rows
from engine.schema import Feature, ViewSchema
from engine.version import ViewVersion
from loaders.apply import event_times, key_hashes, stored_event_times
from loaders.arrow_rows import encode, published_schema
from loaders.compaction import merged, overlays_to_merge, unfolded
from loaders.request_log import Applied
from loaders.segment_writer import ChunkBuilder
from loaders.store_writer import NewOverlay, StoreWriter, seal_overlay

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Push:
    """Rows as `engine.pushed_rows` makes them, which become visible at once; by `request_id` a repetition is known."""

    rows: Sequence[pa.RecordBatch]
    request_id: str | None = None


@dataclass(frozen=True)
class Pushed:
    """What became of a push, and the version of the store that shows it."""

    applied: Applied
    version: int


def push(writer: StoreWriter, view: str, pushes: Sequence[Push]) -> list[Pushed]:
    """Apply pushes to a view in one commit, which is on the disk when this returns.

    Raises:
        UnknownFeature: the store has no such view.
        PushElsewhere: the view is not kept on this node.
        PushInvalid: rows do not fit the view's schema, which changed since they were made; nothing was applied.
        StoreFull: there is no room; nothing was applied.
    """
    with writer.changing(view):
        version = writer.version().view(view)
        check_takes_pushes(version)
        answers: dict[str | int, Applied] = {}
        fresh: dict[str | int, Push] = {}
        for number, order in enumerate(pushes):
            known = writer.requests.applied(view, order.request_id) if order.request_id else None
            if known is not None:
                answers[order.request_id or number] = known
            else:
                fresh.setdefault(order.request_id or number, order)
        group = _Group(version)
        for one, run in groupby(_parts(fresh), key=lambda part: part.columns):
            group.lay(one, list(run))
        reached("push.laid")
        for name, order in fresh.items():
            rows = sum(batch.num_rows for batch in order.rows)
            answers[name] = Applied(rows, group.superseded[name])
        remembered = {name: answers[name] for name in fresh if isinstance(name, str)}
        if group.overlays or remembered:
            _commit(writer, group, remembered)
        now = writer.version().id
        return [Pushed(answers[order.request_id or number], now) for number, order in enumerate(pushes)]


def push_rows(
    writer: StoreWriter,
    view: str,
    rows: Mapping[str, Any] | None = None,
    *,
    deletes: Mapping[str, Any] | None = None,
    request_id: str | None = None,
) -> Pushed:
    """Push rows, and deletions, as columns: see `engine.pushed_rows.pushed_rows` and `deleted_rows`.

    Raises:
        UnknownFeature: the store has no such view.
        PushInvalid: the columns do not fit it.
        StoreFull: there is no room; nothing was applied.
    """
    version, now, batches = writer.version().view(view), datetime.now(UTC), []
    if rows is not None:
        batches.append(pushed_rows(version, rows, now=now))
    if deletes is not None:
        batches.append(deleted_rows(version, deletes, now=now))
    (answer,) = push(writer, view, [Push(batches, request_id)])
    return answer


@dataclass(frozen=True)
class _Part:
    """Rows of a push that give the same features, or are all tombstones, which give none."""

    push: str | int
    rows: pa.RecordBatch

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.rows.schema.names)


def _parts(pushes: dict[str | int, Push]) -> list[_Part]:
    return [_Part(name, batch) for name, order in pushes.items() for batch in order.rows if batch.num_rows]


class _Group:
    """A view with pushes laid over it, before any of it is stored: `overlays` are the new ones, newest first."""

    def __init__(self, version: ViewVersion) -> None:
        self.version = version
        self.overlays: list[NewOverlay] = []
        self.superseded: Counter[str | int] = Counter()
        self.watermark = version.record.watermark

    def lay(self, columns: Sequence[str], parts: Sequence[_Part]) -> None:
        """Lay rows over it that give the same features."""
        rows = _one_batch([part.rows for part in parts])
        keys, event_time = key_hashes(rows), event_times(rows)
        order = np.lexsort((np.arange(event_time.size), event_time, keys[1], keys[0]))
        in_order = keys[:, order]
        is_last = np.append((in_order[:, 1:] != in_order[:, :-1]).any(axis=0), True)
        newest = order[is_last]
        stored = stored_event_times(self.version, keys[:, newest])
        self._count_superseded(parts, order, is_last, event_time, stored)
        winners = newest[event_time[newest] >= stored]
        if winners.size:
            self._add(_completed(rows.take(pa.array(winners)), self.version), int(event_time[winners].max()))

    def _count_superseded(
        self,
        parts: Sequence[_Part],
        order: npt.NDArray[np.int64],
        is_last: npt.NDArray[np.bool_],
        event_time: npt.NDArray[np.int64],
        stored: npt.NDArray[np.int64],
    ) -> None:
        """Count the rows of each push that are older than what stands in the end."""
        final = np.maximum(stored, event_time[order[is_last]])
        key_of: npt.NDArray[np.int64] = np.cumsum(is_last) - is_last
        late = np.empty(event_time.size, np.bool_)
        late[order] = event_time[order] < final[key_of]
        start = 0
        for part in parts:
            end = start + part.rows.num_rows
            self.superseded[part.push] += int(late[start:end].sum())
            start = end

    def _add(self, rows: pa.RecordBatch, newest: int) -> None:
        record = self.version.record
        chunk = ChunkBuilder(RowLayout(record.view_schema), rows.num_rows, with_origins=False)
        encode(chunk, 0, rows, pushed=True)
        watermark = _EPOCH + timedelta(microseconds=newest)
        overlay = seal_overlay(
            record.view_schema,
            [chunk],
            (),
            first_seq=record.applied_seq,
            last_seq=record.applied_seq,
            last_entry=record.applied_entry,
            watermark=watermark,
        )
        self.overlays.insert(0, overlay)
        self.watermark = max(self.watermark, watermark) if self.watermark else watermark
        self.version = ViewVersion(record, (overlay.segment(), *self.version.segments), self.version.transaction)


def _commit(writer: StoreWriter, group: _Group, remembered: dict[str, Applied]) -> None:
    view, schema = group.version.name, group.version.record.view_schema
    new = len(group.overlays)
    older = unfolded(group.version.record.overlays, writer.folding.get(view))
    count = max(new, overlays_to_merge([*(overlay.record for overlay in group.overlays), *older]))
    overlay = None
    if new:
        writer.check_sources(view, group.version.segments[new:count])
        overlay = merged(schema, group.version.segments[:count]) if count > 1 else group.overlays[0]

    def lay_over(record: ViewRecord | None) -> ViewRecord | None:
        writer.version().view(view)  # Raises ViewDamaged if a source was found damaged meanwhile.
        if record is None or overlay is None:
            return record
        overlays = (overlay.record, *record.overlays[count - new :])
        return record.model_copy(update={"overlays": overlays, "watermark": group.watermark})

    def remember(transaction: lmdb.Transaction) -> None:
        writer.requests.write(transaction, view, remembered)

    writer.commit_view(view, lay_over, overlay, also=remember)


def _one_batch(batches: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    if len(batches) == 1:
        return batches[0]
    try:
        return pa.Table.from_batches(batches).combine_chunks().to_batches()[0]
    except pa.ArrowInvalid as error:
        raise PushInvalid(f"rows of different types were pushed: {error}; push them again") from None


def _completed(rows: pa.RecordBatch, version: ViewVersion) -> pa.RecordBatch:
    """Rows with all columns of their view: features that they lack are as the store has them, or null in tombstones."""
    schema = version.record.view_schema
    lacking = [feature for feature in schema.features if feature.name not in rows.schema.names]
    if rows.column(TOMBSTONE)[0].as_py():
        added = {feature.name: pa.nulls(rows.num_rows) for feature in lacking}
    else:
        added = _as_stored(version, lacking, key_hashes(rows)) if lacking else {}
    return _in_order(schema, rows, added)


def _as_stored(version: ViewVersion, features: Sequence[Feature], keys: npt.NDArray[np.int64]) -> dict[str, pa.Array]:
    names = tuple(feature.name for feature in features)
    found = read_columns(version, names, keys, oldest=gathering.NO_EVENT_TIME, stale="serve")
    return {name: column.to_arrow() for name, column in zip(names, found.columns, strict=True)}


def _in_order(schema: ViewSchema, rows: pa.RecordBatch, added: dict[str, pa.Array]) -> pa.RecordBatch:
    wanted = published_schema(schema, delta=True)
    columns = []
    for field in wanted:
        if field.name not in added and field.name not in rows.schema.names:
            raise PushInvalid(f"rows for view {schema.name!r} lack {field.name!r}; push them again")
        column = added[field.name] if field.name in added else rows.column(field.name)
        try:
            columns.append(column.cast(field.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise PushInvalid(
                f"feature {field.name!r} of view {schema.name!r} is {field.type} now, {column.type} was pushed; push "
                f"the rows again"
            ) from None
    unknown = set(rows.schema.names) - set(wanted.names)
    if unknown:
        raise PushInvalid(f"view {schema.name!r} has no feature {min(unknown)!r} any more; push the rows without it")
    return pa.RecordBatch.from_arrays(columns, schema=wanted)
