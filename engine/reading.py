"""Read a version of a store: one transaction of the live environment, and the bases that it names."""

from pathlib import Path

from engine import catalog
from engine.environment import (
    LiveEnvironment,
    ReadTransaction,
    damage_named,
    generation_path,
    map_generation,
    open_live,
)
from engine.errors import LOAD_AGAIN, START_ANEW, StoreDamaged, StoreLocked, StoreUnreadable
from engine.seal import check_seal
from engine.segment import Chunk, Segment
from engine.shards import Shard
from engine.version import Damage, StoreVersion, ViewVersion, shard_of


def read_version(
    store: Path, live: LiveEnvironment, previous: StoreVersion | None, *, keep_readable: bool = True
) -> StoreVersion:
    """The newest committed version; what `previous` has in common with it is taken over.

    Args:
        live: where it was last; where it is now, if that was replaced, is in the version.
        keep_readable: of a view that cannot be read any more, keep what `previous` has.

    Raises:
        StoreDamaged: the catalog cannot be read.
    """
    transaction = _begin(store, live)
    live = transaction.live
    with damage_named(live.path):
        raw = catalog.read_raw(transaction.lmdb, live.catalog)
    check_seal(raw, transaction.lmdb.id())
    if previous is not None and previous.live is live and transaction.lmdb.id() < previous.id:
        raise StoreDamaged(
            f"{live.path} is at commit {transaction.lmdb.id()}, and was at {previous.id}: commits were lost; "
            f"{START_ANEW}"
        )
    store_record = catalog.store_in(raw)
    shard = shard_of(store_record)
    views, damaged = {}, {}
    noted = catalog.damage_in(raw)
    for name, value in catalog.raw_views(raw).items():
        old = previous.views.get(name) if previous else None
        notes = noted.get(name, ())
        if old is not None and _first_note(old.record, notes) is not None:
            # It is open here, but what it shows is wrong.
            old = None
        if old is not None and old.raw == value and old.transaction.live is live:
            views[name] = old.carried_over(transaction)
            continue
        record = None
        try:
            record = catalog.decode_view(value)
            if (note := _first_note(record, notes)) is not None:
                raise StoreDamaged(note.message)
            views[name] = _read_view(store, transaction, record, value, old, shard)
        except (StoreDamaged, StoreUnreadable) as error:
            damaged[name] = Damage(type(error), str(error), record)
            if old is not None and keep_readable:
                views[name] = old
    return StoreVersion(
        id=transaction.lmdb.id(),
        live=live,
        store=store_record,
        views=views,
        services=catalog.services_in(raw),
        troubles=catalog.troubles_in(raw),
        damaged=damaged,
        noted=noted,
    )


def _first_note(record: catalog.ViewRecord, notes: tuple[catalog.DamagedSegment, ...]) -> catalog.DamagedSegment | None:
    """The note of the first segment that lookups would read and that is damaged; None if all are sound."""
    found = (catalog.note_of(segment, notes) for segment in record.served) if notes else ()
    return next((note for note in found if note is not None), None)


def _begin(store: Path, live: LiveEnvironment) -> ReadTransaction:
    """A transaction on the environment that the store has now; the last one that was there says when it is another."""
    while True:
        transaction = ReadTransaction(live)
        with damage_named(live.path):
            is_replaced = live.is_replaced(transaction.lmdb)
        if not is_replaced:
            return transaction
        later = _open_like(store, live)
        if later is live:
            return transaction  # The later one was removed by hand: what is open here is served on.
        live = later


def _read_view(
    store: Path,
    transaction: ReadTransaction,
    record: catalog.ViewRecord,
    raw: bytes,
    old: ViewVersion | None,
    shard: Shard | None,
) -> ViewVersion:
    """A view's version; segments that an older one has are taken from there."""
    # The base, which comes last, is in a file of its own; overlays stay where they are in their environment's.
    same = slice(None) if old is not None and old.transaction.live is transaction.live else slice(-1, None)
    known = {segment.record.id: segment for segment in old.segments[same]} if old is not None else {}
    overlays = [known.get(overlay.id) or read_overlay(transaction, overlay) for overlay in record.overlays]
    base = known.get(record.base.id)
    # A base that was damaged is built again under its old id.
    if base is None or base.record != record.base:
        base = read_generation(store, record.base)
    return ViewVersion(record, (*overlays, base), transaction, raw, shard)


def _open_like(store: Path, live: LiveEnvironment) -> LiveEnvironment:
    """The environment that the store has now: writable, if the one before was, so that this process can write still."""
    try:
        return open_live(store, writable=live.writable)
    except StoreLocked:
        return open_live(store)  # Somebody in this process was faster, and only reads.


def read_overlay(transaction: ReadTransaction, record: catalog.SegmentRecord) -> Segment:
    """An overlay, whose chunks are views of the map that end with the transaction; raises StoreDamaged."""
    live, chunks = transaction.live, []
    for number in range(record.chunks):
        key = catalog.chunk_key(record.id, number)
        with damage_named(live.path):
            value = transaction.lmdb.get(key, db=live.segments)
        if value is None:
            raise StoreDamaged(f"{live.path} has no chunk {key.decode()}, though the catalog names it; {LOAD_AGAIN}")
        chunks.append(Chunk(value, f"{live.path} chunk {key.decode()}"))
    return Segment(record, chunks)


def read_generation(store: Path, record: catalog.SegmentRecord) -> Segment:
    """A base, whose chunks keep its file mapped.

    The checksums are not verified: that would read all of it, at each start of each process. The writer's scrub does.

    Raises:
        StoreDamaged: its file is missing or cut short, a chunk's header is wrong, or it is another file.
        StoreUnreadable: the system refuses to map it now.
    """
    path = generation_path(store, record.view_schema.name, record.id)
    content = map_generation(path)
    if len(content) < record.bytes:
        raise StoreDamaged(
            f"generation {path} has {len(content)} bytes, its chunks alone take {record.bytes}: it was cut short; "
            f"{LOAD_AGAIN}"
        )
    chunks = [Chunk(content[offset:], f"{path} chunk {number}") for number, offset in enumerate(record.offsets)]
    rows = sum(chunk.header.rows for chunk in chunks)
    if rows != record.rows + record.tombstones:
        # A repair that died had built it again, cut into other chunks, and not come to tell the catalog.
        raise StoreDamaged(
            f"generation {path} has {rows} rows where the catalog says {record.rows + record.tombstones}; {LOAD_AGAIN}"
        )
    return Segment(record, chunks)
