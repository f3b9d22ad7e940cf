"""Apply pushed rows: each push as if it were alone, in the order of arrival, but all of a group in one commit.

The rows of one push apply in the order of their event times. A row replaces the store's row of its key unless that is
newer; features that a row lacks keep the values that the store has (`loaders.pushed_chains`). A group becomes one
overlay, merged at once with as many of the newest ones as the tiers ask for, so that many small commits leave few
overlays.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import lmdb
import pyarrow as pa
import xxhash

from engine.catalog import ViewRecord
from engine.control import REQUEST_ID_HEADER
from engine.errors import IdempotencyKeyReused
from engine.failpoints import reached
from engine.layout import RowLayout
from engine.manifest import EVENT_TIMESTAMP
from engine.pushed_rows import EVENT_TIME_COLUMN, check_takes_pushes, deleted_rows, pushed_rows
from engine.showing import shown
from engine.times import to_datetime
from engine.version import ViewVersion
from loaders.apply import event_times
from loaders.arrow_rows import encode
from loaders.compaction import merged, overlays_to_merge, unfolded
from loaders.pushed_chains import resolved
from loaders.request_log import Applied, Known
from loaders.segment_writer import ChunkBuilder
from loaders.store_writer import NewOverlay, StoreWriter, seal_overlay

_Name = str | int
"""What a push is known by in its group: its request id, or its number if it has none."""


@dataclass(frozen=True)
class Push:
    """Rows as `engine.pushed_rows` makes them, which become visible at once; by `request_id` a repetition is known.

    `content` is a digest of what the client sent, by which another push under the same id is told from a repetition.
    Where it is empty, as it is of old workers, every push is taken for a repetition.
    """

    rows: Sequence[pa.RecordBatch]
    request_id: str | None = None
    content: bytes = b""


@dataclass(frozen=True)
class Pushed:
    """What became of a push, and the version of the store that shows it."""

    applied: Applied
    version: int


def push(writer: StoreWriter, view: str, pushes: Sequence[Push]) -> list[Pushed | IdempotencyKeyReused]:
    """Apply pushes to a view in one commit, which is on the disk when this returns. A push with the id of an earlier
    one, and other content, is not applied; an error takes the place of its answer.

    Raises:
        UnknownFeature: the store has no such view.
        PushElsewhere: the view is not kept on this node.
        PushInvalid: rows do not fit the view's schema, which changed since they were made; nothing was applied.
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
            known[name] = Known(Applied(rows, laid.superseded.get(name, 0)), order.content)
        remembered = {name: known[name] for name in fresh if isinstance(name, str)}
        if laid.overlay or remembered:
            _commit(writer, version, laid, remembered)
        now = writer.version().id
        return [_answer(known[name], order, now, view) for name, order in zip(names, pushes, strict=True)]


def _answer(known: Known, order: Push, version: int, view: str) -> Pushed | IdempotencyKeyReused:
    if known.content and order.content and known.content != order.content:
        return IdempotencyKeyReused(
            f"the {REQUEST_ID_HEADER} {shown(order.request_id)} was used for a push to view {view!r} with other "
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
    """Push rows, and deletions, as columns: see `engine.pushed_rows.pushed_rows` and `deleted_rows`.

    Raises:
        UnknownFeature: the store has no such view.
        PushInvalid: the columns do not fit it.
        IdempotencyKeyReused: other rows were pushed to the view under this id; nothing was applied.
        StoreFull: there is no room; nothing was applied.
    """
    version, now, batches = writer.version().view(view), datetime.now(UTC), []
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
    """A digest of rows as their caller gave them: without event times if they had none."""
    digest = xxhash.xxh3_128()
    for batch, given in zip(batches, [of for of in columns if of is not None], strict=True):
        is_timed = EVENT_TIME_COLUMN in given
        digest.update(repr((batch if is_timed else batch.drop_columns([EVENT_TIMESTAMP])).to_pydict()).encode())
    return digest.digest()


@dataclass(frozen=True)
class _Laid:
    """Pushes laid over a view, before any of it is stored: the overlay that they make, None if no row is taken, and how
    many rows of each push are superseded."""

    overlay: NewOverlay | None
    watermark: datetime | None
    superseded: Mapping[_Name, int]


def _lay(version: ViewVersion, pushes: Mapping[_Name, Push]) -> _Laid:
    record, names = version.record, list(pushes)
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
    view, overlay, older = version.name, laid.overlay, 0
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
