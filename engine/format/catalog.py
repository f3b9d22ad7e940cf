"""The catalog of a store: for each view, its segments and its position in the export's log.

Each view's record is one value in the live environment. One write transaction replaces the records of all changed
views, so these views change at once. Only the store's writer writes the catalog.
"""

from collections.abc import Iterable
from datetime import datetime
from typing import Literal, Self, TypeVar

import lmdb
import orjson
from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from shoal.engine.base.errors import LOAD_AGAIN, START_ANEW, StoreDamaged
from shoal.engine.format.schema import FeatureService, ViewSchema
from shoal.engine.format.seal import delete_entry, put_entry

_Model = TypeVar("_Model", bound="_Record")
_STORE_KEY = b"store"
_SERVICES_KEY = b"services"
_VIEW_PREFIX = b"view:"
_TROUBLE_PREFIX = b"trouble:"
_PUSHED_TO_PREFIX = b"pushed-to:"
_DAMAGE_PREFIX = b"damage:"
_REMOVALS_PREFIX = b"removals:"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Origin(_Record):
    """The origin of a row: one entry of the view's log."""

    kind: Literal["snapshot", "delta"]
    seq: int
    id: str


class LowWatermark(_Record):
    """A low watermark, and the first log entry with this low watermark. The sources of all published rows have reached
    this event time, except the sources of rows with an age of their own (see `layout.OWN_AGE`)."""

    at: AwareDatetime
    set_by: Origin


class SegmentRecord(_Record):
    """One segment: a base generation (an environment of its own) or an overlay (chunks in the live environment).

    The segment contains the changes of the log entries `first_seq` … `last_seq`; a row's origin is a position in
    `origins`. `offsets` are the positions of a base's chunks in its environment's file. `pushed` counts the rows and
    tombstones that were pushed; pushed rows have no origin. `low_watermark` is the view's low watermark at the time
    when the base was built. It is None for overlays.
    """

    id: str
    view_schema: ViewSchema
    origins: tuple[Origin, ...]
    first_seq: int
    last_seq: int
    last_entry: str
    chunks: int
    offsets: tuple[int, ...] = ()
    rows: int
    tombstones: int
    pushed: int = 0
    bytes: int
    watermark: AwareDatetime | None
    low_watermark: LowWatermark | None = None
    created_at: AwareDatetime


class Trouble(_Record):
    """The reason why a view is not updated: the writer's error, with the name of the error's class in `code`."""

    code: str
    message: str
    since: AwareDatetime


class DamagedSegment(_Record):
    """The note that a segment is damaged. A repaired segment may have the same id, but has a later `created_at`."""

    id: str
    created_at: AwareDatetime
    message: str
    since: AwareDatetime

    @classmethod
    def of(cls, segment: SegmentRecord, message: str, since: datetime) -> Self:
        """Return the note that a segment is damaged."""
        return cls(id=segment.id, created_at=segment.created_at, message=message, since=since)

    def is_of(self, segment: SegmentRecord) -> bool:
        """Return whether this note belongs to a segment."""
        return (self.id, self.created_at) == (segment.id, segment.created_at)


def note_of(segment: SegmentRecord, notes: Iterable[DamagedSegment]) -> DamagedSegment | None:
    """Return the note of a segment from the notes of its view; None if the segment has no note."""
    return next((note for note in notes if note.is_of(segment)), None)


class DamageRecord(_Record):
    """The damaged segments of one view. The record has its own key, so that older versions of Shoal ignore it."""

    segments: tuple[DamagedSegment, ...] = ()


class ViewRecord(_Record):
    """A view as requests see it: its overlays, newest first, and below them its base.

    `applied_seq` and `applied_entry` identify the last applied entry of the log. A pinned view stays at its base until
    a reload request for this view names no snapshot. `kept` are earlier bases, newest first, for rollbacks.
    """

    view_schema: ViewSchema
    base: SegmentRecord
    overlays: tuple[SegmentRecord, ...] = ()
    kept: tuple[SegmentRecord, ...] = ()
    applied_seq: int
    applied_entry: str
    published_at: AwareDatetime
    applied_at: AwareDatetime
    watermark: AwareDatetime | None
    low_watermark: LowWatermark | None = None
    pinned: bool = False

    @property
    def needs_format_2(self) -> bool:
        """Whether the record has members that are unknown to version 0.1.0."""
        schema = self.view_schema
        is_new = schema.future != "refuse" or any(feature.feast_member is not None for feature in schema.features)
        return is_new or self.low_watermark is not None

    @property
    def served(self) -> tuple[SegmentRecord, ...]:
        """The segments for lookups, newest first."""
        return (*self.overlays, self.base)

    @property
    def segments(self) -> tuple[SegmentRecord, ...]:
        """All segments of the view on this node."""
        return (*self.served, *self.kept)


class StoreRecord(_Record):
    """The store's own record: its format, the export root of its last load, and its shard, such as 2/4. `shard` is None
    if the store holds all rows.

    In format 2, records may have members that version 0.1.0 does not know (`ViewRecord.needs_format_2`), and rows may
    have an age of their own (see `layout.OWN_AGE`).
    """

    format_version: Literal[1, 2] = 1
    root: str | None = None
    shard: str | None = None


class ServicesRecord(_Record):
    """The feature services of the export root."""

    services: tuple[FeatureService, ...] = ()


def chunk_key(segment_id: str, chunk: int) -> bytes:
    """Return the key of a chunk. The chunks of an overlay are in the live environment, those of a base in the base's
    own environment."""
    return f"{segment_id}/{chunk:06d}".encode()


def read_raw(transaction: lmdb.Transaction, db: lmdb._Database) -> dict[bytes, bytes]:
    """Return the whole catalog, undecoded. Equal bytes mean equal records."""
    return {bytes(key): bytes(value) for key, value in transaction.cursor(db=db)}


def raw_views(raw: dict[bytes, bytes]) -> dict[str, bytes]:
    """Return the undecoded view records of a raw catalog, by name; raise StoreDamaged if a name is invalid."""
    return {_name(key, _VIEW_PREFIX): value for key, value in raw.items() if key.startswith(_VIEW_PREFIX)}


def _name(key: bytes, prefix: bytes) -> str:
    try:
        return key.removeprefix(prefix).decode()
    except UnicodeDecodeError as error:
        raise StoreDamaged(f"the catalog contains the invalid key {key!r} ({error}); {START_ANEW}") from None


def troubles_in(raw: dict[bytes, bytes]) -> dict[str, Trouble]:
    """Return the views that are not updated, and the reasons. Views that are not loaded are included."""
    troubled = ((key, value) for key, value in raw.items() if key.startswith(_TROUBLE_PREFIX))
    return {_name(key, _TROUBLE_PREFIX): _decode(value, Trouble) for key, value in troubled}


def damage_in(raw: dict[bytes, bytes]) -> dict[str, tuple[DamagedSegment, ...]]:
    """Return the damaged segments that a raw catalog lists, by view."""
    noted = ((key, value) for key, value in raw.items() if key.startswith(_DAMAGE_PREFIX))
    return {_name(key, _DAMAGE_PREFIX): _decode(value, DamageRecord).segments for key, value in noted}


def decode_view(value: bytes) -> ViewRecord:
    """Decode one view's record; raise StoreDamaged if it is invalid."""
    return _decode(value, ViewRecord)


def services_in(raw: dict[bytes, bytes]) -> dict[str, FeatureService]:
    """Return the feature services of a raw catalog, by name."""
    value = raw.get(_SERVICES_KEY)
    return {service.name: service for service in _decode(value, ServicesRecord).services} if value else {}


def store_in(raw: dict[bytes, bytes]) -> StoreRecord:
    """Return the store's own record of a raw catalog."""
    value = raw.get(_STORE_KEY)
    return _decode(value, StoreRecord) if value else StoreRecord()


def write_view(transaction: lmdb.Transaction, db: lmdb._Database, name: str, record: ViewRecord) -> None:
    """Replace one view's record."""
    put_entry(transaction, db, _VIEW_PREFIX + name.encode(), _encode(record))


def delete_view(transaction: lmdb.Transaction, db: lmdb._Database, name: str) -> None:
    """Remove one view's record, and the note that rows were pushed to the view."""
    delete_entry(transaction, db, _VIEW_PREFIX + name.encode())
    delete_entry(transaction, db, _PUSHED_TO_PREFIX + name.encode())
    put_entry(transaction, db, _REMOVALS_PREFIX + name.encode(), b"%d" % (removals(transaction, db, name) + 1))


def removals(transaction: lmdb.Transaction, db: lmdb._Database, name: str) -> int:
    """Return how many views of this name were removed from the store. A later view of this name does not contain the
    rows that were pushed to an earlier view of this name."""
    return int(transaction.get(_REMOVALS_PREFIX + name.encode(), b"0", db=db))


def write_trouble(transaction: lmdb.Transaction, db: lmdb._Database, view: str, trouble: Trouble | None) -> None:
    """Write the reason why a view is not updated; None removes the reason."""
    if trouble is None:
        delete_entry(transaction, db, _TROUBLE_PREFIX + view.encode())
    else:
        put_entry(transaction, db, _TROUBLE_PREFIX + view.encode(), _encode(trouble))


def note_pushed_to(transaction: lmdb.Transaction, db: lmdb._Database, view: str) -> None:
    """Note that rows were pushed to a view. The note is a separate entry, because older versions of Shoal reject
    unknown members of the view's record."""
    if not is_pushed_to(transaction, db, view):
        put_entry(transaction, db, _PUSHED_TO_PREFIX + view.encode(), b"")


def is_pushed_to(transaction: lmdb.Transaction, db: lmdb._Database, view: str) -> bool:
    """Return whether rows were ever pushed to a view."""
    return transaction.get(_PUSHED_TO_PREFIX + view.encode(), db=db) is not None


def write_damage(
    transaction: lmdb.Transaction, db: lmdb._Database, view: str, segments: tuple[DamagedSegment, ...]
) -> None:
    """Replace the notes of a view's damaged segments."""
    if segments:
        put_entry(transaction, db, _DAMAGE_PREFIX + view.encode(), _encode(DamageRecord(segments=segments)))
    else:
        delete_entry(transaction, db, _DAMAGE_PREFIX + view.encode())


def write_services(transaction: lmdb.Transaction, db: lmdb._Database, services: tuple[FeatureService, ...]) -> None:
    """Replace the feature services."""
    put_entry(transaction, db, _SERVICES_KEY, _encode(ServicesRecord(services=services)))


def write_store(transaction: lmdb.Transaction, db: lmdb._Database, record: StoreRecord) -> None:
    """Replace the store's own record."""
    put_entry(transaction, db, _STORE_KEY, _encode(record))


def _encode(record: _Record) -> bytes:
    # Members with default values are left out. An older version of Shoal can then read every record that does not use
    # newer members.
    return orjson.dumps(record.model_dump(mode="json", exclude_defaults=True))


def _decode(value: bytes, model: type[_Model]) -> _Model:
    try:
        return model.model_validate_json(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        mend = LOAD_AGAIN if model is ViewRecord else START_ANEW
        problem = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
        raise StoreDamaged(f"the catalog contains an invalid {model.__name__} ({problem}); {mend}") from error
