"""The catalog of a store: for each view, what its rows are made of, and where it stands in the export's log.

Each view's record is one value in the live environment; one write transaction replaces records, so all views change at
once. Only the store's writer writes it.
"""

from collections.abc import Iterable
from datetime import datetime
from typing import Literal, Self, TypeVar

import lmdb
import orjson
from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from engine.errors import LOAD_AGAIN, START_ANEW, StoreDamaged
from engine.schema import FeatureService, ViewSchema
from engine.seal import delete_entry, put_entry

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
    """What wrote a row: one entry of the view's log."""

    kind: Literal["snapshot", "delta"]
    seq: int
    id: str


class LowWatermark(_Record):
    """The event time that the source of every published row has reached, except of rows with an age of their own, and
    the entry of the log that said so first."""

    at: AwareDatetime
    set_by: Origin


class SegmentRecord(_Record):
    """One segment: a base generation (an environment of its own) or an overlay (chunks in the live environment).

    `first_seq` … `last_seq` are the log entries whose changes it holds; a row's origin is a position in `origins`.
    `offsets` are where the chunks of a base begin in its environment's file. `pushed` of the rows and tombstones were
    pushed, and have no origin. `low_watermark` is that of a base's view when the base was built; overlays have none.
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
    """Why a view does not move on: what the writer met, with the name of the error's class."""

    code: str
    message: str
    since: AwareDatetime


class DamagedSegment(_Record):
    """A segment whose bytes were found to be wrong. A repaired segment may have the same id, but is created later."""

    id: str
    created_at: AwareDatetime
    message: str
    since: AwareDatetime

    @classmethod
    def of(cls, segment: SegmentRecord, message: str, since: datetime) -> Self:
        """The note of what was found in a segment."""
        return cls(id=segment.id, created_at=segment.created_at, message=message, since=since)

    def is_of(self, segment: SegmentRecord) -> bool:
        """Whether this is the note of a segment."""
        return (self.id, self.created_at) == (segment.id, segment.created_at)


def note_of(segment: SegmentRecord, notes: Iterable[DamagedSegment]) -> DamagedSegment | None:
    """The note of a segment among the notes of its view; None if there is none."""
    return next((note for note in notes if note.is_of(segment)), None)


class DamageRecord(_Record):
    """The damaged segments of one view. It has a key of its own: code that does not know the key ignores it."""

    segments: tuple[DamagedSegment, ...] = ()


class ViewRecord(_Record):
    """A view as a request sees it: overlays, newest first, over the base.

    `applied_seq` and `applied_entry` are the last entry of the log that the rows hold. A pinned view stays at its
    base until it is reloaded without a snapshot named. `kept` are earlier bases, newest first, for going back.
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
        """Whether the record has members that version 0.1.0 does not know."""
        schema = self.view_schema
        is_new = schema.future != "refuse" or any(feature.feast_member is not None for feature in schema.features)
        return is_new or self.low_watermark is not None

    @property
    def served(self) -> tuple[SegmentRecord, ...]:
        """The segments that lookups read, newest first."""
        return (*self.overlays, self.base)

    @property
    def segments(self) -> tuple[SegmentRecord, ...]:
        """All segments that the view has on this node."""
        return (*self.served, *self.kept)


class StoreRecord(_Record):
    """What the store itself is, and where it was loaded from last; `shard`, such as 2/4, is None where it
    holds all rows.

    Format 2 says that records may have members that version 0.1.0 does not know (`ViewRecord.needs_format_2`), and
    rows an age of their own.
    """

    format_version: Literal[1, 2] = 1
    root: str | None = None
    shard: str | None = None


class ServicesRecord(_Record):
    """The feature services of the export root."""

    services: tuple[FeatureService, ...] = ()


def chunk_key(segment_id: str, chunk: int) -> bytes:
    """The key of an overlay's chunk in the live environment, and of a base's chunk in its own."""
    return f"{segment_id}/{chunk:06d}".encode()


def read_raw(transaction: lmdb.Transaction, db: lmdb._Database) -> dict[bytes, bytes]:
    """All of the catalog, undecoded: equal bytes are equal records."""
    return {bytes(key): bytes(value) for key, value in transaction.cursor(db=db)}


def raw_views(raw: dict[bytes, bytes]) -> dict[str, bytes]:
    """The undecoded view records in a raw catalog, by name; raises StoreDamaged."""
    return {_name(key, _VIEW_PREFIX): value for key, value in raw.items() if key.startswith(_VIEW_PREFIX)}


def _name(key: bytes, prefix: bytes) -> str:
    try:
        return key.removeprefix(prefix).decode()
    except UnicodeDecodeError as error:
        raise StoreDamaged(f"the catalog holds the key {key!r}, which is none ({error}); {START_ANEW}") from None


def troubles_in(raw: dict[bytes, bytes]) -> dict[str, Trouble]:
    """The views that do not move on, loaded or not, and why."""
    troubled = ((key, value) for key, value in raw.items() if key.startswith(_TROUBLE_PREFIX))
    return {_name(key, _TROUBLE_PREFIX): _decode(value, Trouble) for key, value in troubled}


def damage_in(raw: dict[bytes, bytes]) -> dict[str, tuple[DamagedSegment, ...]]:
    """The segments in a raw catalog that are noted as damaged, by view."""
    noted = ((key, value) for key, value in raw.items() if key.startswith(_DAMAGE_PREFIX))
    return {_name(key, _DAMAGE_PREFIX): _decode(value, DamageRecord).segments for key, value in noted}


def decode_view(value: bytes) -> ViewRecord:
    """One view's record; raises StoreDamaged."""
    return _decode(value, ViewRecord)


def services_in(raw: dict[bytes, bytes]) -> dict[str, FeatureService]:
    """The feature services in a raw catalog, by name."""
    value = raw.get(_SERVICES_KEY)
    return {service.name: service for service in _decode(value, ServicesRecord).services} if value else {}


def store_in(raw: dict[bytes, bytes]) -> StoreRecord:
    """The store's own record in a raw catalog."""
    value = raw.get(_STORE_KEY)
    return _decode(value, StoreRecord) if value else StoreRecord()


def write_view(transaction: lmdb.Transaction, db: lmdb._Database, name: str, record: ViewRecord) -> None:
    """Replace one view's record."""
    put_entry(transaction, db, _VIEW_PREFIX + name.encode(), _encode(record))


def delete_view(transaction: lmdb.Transaction, db: lmdb._Database, name: str) -> None:
    """Remove one view's record, and the note that rows were pushed to it."""
    delete_entry(transaction, db, _VIEW_PREFIX + name.encode())
    delete_entry(transaction, db, _PUSHED_TO_PREFIX + name.encode())
    put_entry(transaction, db, _REMOVALS_PREFIX + name.encode(), b"%d" % (removals(transaction, db, name) + 1))


def removals(transaction: lmdb.Transaction, db: lmdb._Database, name: str) -> int:
    """Return how many views of a name were removed from the store: what was pushed to one is not in the next."""
    return int(transaction.get(_REMOVALS_PREFIX + name.encode(), b"0", db=db))


def write_trouble(transaction: lmdb.Transaction, db: lmdb._Database, view: str, trouble: Trouble | None) -> None:
    """Note why a view does not move on; None once it does."""
    if trouble is None:
        delete_entry(transaction, db, _TROUBLE_PREFIX + view.encode())
    else:
        put_entry(transaction, db, _TROUBLE_PREFIX + view.encode(), _encode(trouble))


def note_pushed_to(transaction: lmdb.Transaction, db: lmdb._Database, view: str) -> None:
    """Note that rows were pushed to a view: stored in its own entry, because older versions reject unknown members of
    the view's record."""
    if not is_pushed_to(transaction, db, view):
        put_entry(transaction, db, _PUSHED_TO_PREFIX + view.encode(), b"")


def is_pushed_to(transaction: lmdb.Transaction, db: lmdb._Database, view: str) -> bool:
    """Whether rows were ever pushed to a view."""
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
    # Without defaults, so that a version that does not know a newer member reads every record that does not use it.
    return orjson.dumps(record.model_dump(mode="json", exclude_defaults=True))


def _decode(value: bytes, model: type[_Model]) -> _Model:
    try:
        return model.model_validate_json(value)
    except ValidationError as error:
        first, mend = error.errors(include_url=False)[0], LOAD_AGAIN if model is ViewRecord else START_ANEW
        problem = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
        raise StoreDamaged(f"the catalog holds a {model.__name__} that cannot be read ({problem}); {mend}") from error
