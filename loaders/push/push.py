"""Apply the pushes of a group in one commit, with the same effect as one commit per push in the order of arrival.

The rows of one push apply in the order of their event times. A row replaces the stored row of its key unless the stored
row is newer. Features missing from a row keep their stored values (`shoal.loaders.push.pushed_chains`). A group becomes
one overlay. The overlay is merged at once with as many of the newest overlays as the tiers require, so that many small
commits leave few overlays.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import lmdb
import pyarrow as pa
import xxhash

from shoal.engine.base.errors import IdempotencyKeyReused
from shoal.engine.base.failpoints import reached
from shoal.engine.base.quoting import abbreviated
from shoal.engine.base.times import to_datetime
from shoal.engine.format.catalog import ViewRecord
from shoal.engine.format.layout import RowLayout
from shoal.engine.process.control import REQUEST_ID_HEADER
from shoal.engine.push.pushed_rows import (
    EVENT_TIME_COLUMN,
    check_takes_pushes,
    deleted_rows,
    pushed_rows,
)
from shoal.engine.root.manifest import EVENT_TIMESTAMP
from shoal.engine.store.version import ViewVersion
from shoal.loaders.apply.compaction import merged, overlays_to_merge, unfolded
from shoal.loaders.apply.entries import event_times
from shoal.loaders.commit.request_log import Known, PushOutcome
from shoal.loaders.commit.store_writer import NewOverlay, StoreWriter, seal_overlay
from shoal.loaders.push.pushed_chains import resolved
from shoal.loaders.segments.arrow_rows import encode
from shoal.loaders.segments.segment_writer import ChunkBuilder

_Name = str | int
"""The name of a push in its group: its request id, or its number if it has no request id."""


@dataclass(frozen=True)
class Push:
    """The rows of one push, as `shoal.engine.push.pushed_rows` makes them. They become visible all at once.

    `request_id` identifies a repeated push. `content` is a digest of what the client sent; it tells a repeated push
    from a different push under the same id. If `content` is empty, as from old workers, every push under the id counts
    as a repetition.
    """

    rows: Sequence[pa.RecordBatch]
    request_id: str | None = None
    content: bytes = b""


@dataclass(frozen=True)
class Pushed:
    """The outcome of a push, and the version of the store that shows it."""

    applied: PushOutcome
    version: int


def push(writer: StoreWriter, view: str, pushes: Sequence[Push]) -> list[Pushed | IdempotencyKeyReused]:
    """Apply pushes to a view in one commit, which is on the disk when this returns.

    If a push has the id of an earlier push but other content, the push is not applied. Its answer is then an error.

    Raises:
        UnknownFeature: the store has no such view.
        PushElsewhere: the view is not kept on this node.
        PushInvalid: rows do not fit the view's schema, because it changed after the rows were made; nothing was
            applied.
        StoreFull: there is no room; nothing was applied.
    """
    with writer.changing(view):
        version = writer.version().view(view)
        check_takes_pushes(version)
        names: list[_Name] = [order.request_id or number for number, order in enumerate(pushes)]
        known: dict[_Name, Known] = {}
        fresh: dict[_Name, Push] = {}
        for name, order in zip(names, pushes, strict=True):
            earlier = writer.requests.known(view, name) if isinstance(name, str) else None
            if earlier is not None:
                known[name] = earlier
            else:
                fresh.setdefault(name, order)
        laid = _lay(version, fresh)
        reached("push.laid")
        for name, order in fresh.items():
            rows = sum(batch.num_rows for batch in order.rows)
            known[name] = Known(PushOutcome(rows, laid.superseded.get(name, 0)), order.content)
        remembered = {name: known[name] for name in fresh if isinstance(name, str)}
        if laid.overlay or remembered:
            _commit(writer, version, laid, remembered)
        now = writer.version().id
        return [_answer(known[name], order, now, view) for name, order in zip(names, pushes, strict=True)]


def _answer(known: Known, order: Push, version: int, view: str) -> Pushed | IdempotencyKeyReused:
    if known.content and order.content and known.content != order.content:
        return IdempotencyKeyReused(
            f"the {REQUEST_ID_HEADER} {abbreviated(order.request_id)} was used for a push to view {view!r} with other "
            f"content; push this one under a new key"
        )
    return Pushed(known.applied, version)


def push_rows(
    writer: StoreWriter,
    view: str,
    rows: Mapping[str, Any] | None = None,
    *,
    deletes: Mapping[str, Any] | None = None,
    request_id: str | None = None,
) -> Pushed:
    """Push rows and deletions, given as columns: see `shoal.engine.push.pushed_rows.pushed_rows` and `deleted_rows`.

    Raises:
        UnknownFeature: the store has no such view.
        PushInvalid: the columns do not fit the view.
        IdempotencyKeyReused: other rows were pushed to the view under this id; nothing was applied.
        StoreFull: there is no room; nothing was applied.
    """
    version = writer.version().view(view)
    now = datetime.now(UTC)
    batches = []
    if rows is not None:
        batches.append(pushed_rows(version, rows, now=now))
    if deletes is not None:
        batches.append(deleted_rows(version, deletes, now=now))
    content = _content(batches, (rows, deletes)) if request_id is not None else b""
    (answer,) = push(writer, view, [Push(batches, request_id, content)])
    if isinstance(answer, IdempotencyKeyReused):
        raise answer
    return answer


def _content(batches: Sequence[pa.RecordBatch], columns: Sequence[Mapping[str, Any] | None]) -> bytes:
    """Return a digest of the rows as the caller gave them: without event times if the caller gave none."""
    digest = xxhash.xxh3_128()
    for batch, given in zip(batches, [of for of in columns if of is not None], strict=True):
        is_timed = EVENT_TIME_COLUMN in given
        digest.update(repr((batch if is_timed else batch.drop_columns([EVENT_TIMESTAMP])).to_pydict()).encode())
    return digest.digest()


@dataclass(frozen=True)
class _Laid:
    """The result of a group of pushes, before anything is stored.

    `overlay` is None if all rows are superseded. `watermark` is the view's watermark after the pushes. `superseded` is
    the number of superseded rows of each push.
    """

    overlay: NewOverlay | None
    watermark: datetime | None
    superseded: Mapping[_Name, int]


def _lay(version: ViewVersion, pushes: Mapping[_Name, Push]) -> _Laid:
    record = version.record
    names = list(pushes)
    parts = [(number, batch) for number, name in enumerate(names) for batch in pushes[name].rows if batch.num_rows]
    if not parts:
        return _Laid(None, record.watermark, {})
    outcome = resolved(version, parts, len(names))
    superseded = dict(zip(names, outcome.superseded, strict=True))
    rows = outcome.rows
    if rows is None:
        return _Laid(None, record.watermark, superseded)
    chunk = ChunkBuilder(RowLayout(record.view_schema), rows.num_rows, with_origins=False)
    encode(chunk, 0, rows, pushed=True)
    newest = to_datetime(int(event_times(rows).max()))
    overlay = seal_overlay(
        record.view_schema,
        [chunk],
        (),
        first_seq=record.applied_seq,
        last_seq=record.applied_seq,
        last_entry=record.applied_entry,
        watermark=newest,
    )
    return _Laid(overlay, max(record.watermark, newest) if record.watermark else newest, superseded)


def _commit(writer: StoreWriter, version: ViewVersion, laid: _Laid, remembered: dict[str, Known]) -> None:
    view = version.name
    overlay = laid.overlay
    older = 0
    if overlay is not None:
        unmerged = unfolded(version.record.overlays, writer.folding.get(view))
        older = max(overlays_to_merge([overlay.record, *unmerged]) - 1, 0)
    if overlay is not None and older:
        writer.check_sources(view, version.segments[:older])
        overlay = merged(version.record.view_schema, [overlay.segment(), *version.segments[:older]])

    def lay_over(record: ViewRecord | None) -> ViewRecord | None:
        writer.version().view(view)  # Raises ViewDamaged if a source was found damaged meanwhile.
        if record is None or overlay is None:
            return record
        overlays = (overlay.record, *record.overlays[older:])
        return record.model_copy(update={"overlays": overlays, "watermark": laid.watermark})

    def remember(transaction: lmdb.Transaction) -> None:
        writer.note_pushed_to(transaction, view)
        writer.requests.write(transaction, view, remembered)

    writer.commit_view(view, lay_over, overlay, also=remember)
