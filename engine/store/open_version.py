"""Read a version of a store: one transaction of the live environment, and the bases that its catalog names."""

from pathlib import Path

from shoal.engine.base.errors import (
    LOAD_AGAIN,
    START_ANEW,
    StoreDamaged,
    StoreLocked,
    StoreUnreadable,
)
from shoal.engine.base.shards import Shard
from shoal.engine.format import catalog
from shoal.engine.format.paths import generation_path
from shoal.engine.format.seal import check_seal
from shoal.engine.store.environment import LiveEnvironment, ReadTransaction, damage_named, map_generation, open_live
from shoal.engine.store.segment import Chunk, Segment
from shoal.engine.store.version import Damage, StoreVersion, ViewVersion, shard_of


def read_version(
    store: Path, live: LiveEnvironment, previous: StoreVersion | None, *, keep_readable: bool = True
) -> StoreVersion:
    """Return the newest committed version. The new version shares unchanged views and segments with `previous`.

    Args:
        live: the last known live environment; if it was replaced, the returned version has the current live
            environment.
        keep_readable: whether to keep the version of a view from `previous` if the view can no longer be read.

    Raises:
        StoreDamaged: the catalog cannot be read, or commits were lost.
    """
    transaction = _begin(store, live)
    live = transaction.live
    with damage_named(live.path):
        raw = catalog.read_raw(transaction.lmdb, live.catalog)
    check_seal(raw, transaction.lmdb.id())
    if previous is not None and previous.live is live and transaction.lmdb.id() < previous.id:
        raise StoreDamaged(
            f"{live.path} is at commit {transaction.lmdb.id()}, but was at {previous.id} before: commits were lost; "
            f"{START_ANEW}"
        )
    store_record = catalog.store_in(raw)
    shard = shard_of(store_record)
    views = {}
    damaged = {}
    noted = catalog.damage_in(raw)
    for name, value in catalog.raw_views(raw).items():
        old = previous.views.get(name) if previous else None
        notes = noted.get(name, ())
        if old is not None and _first_note(old.record, notes) is not None:
            # The old version of the view is open in this process, but its data is damaged.
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
    """Return the note of the first damaged segment among the segments for lookups; None if no segment is damaged."""
    found = (catalog.note_of(segment, notes) for segment in record.served) if notes else ()
    return next((note for note in found if note is not None), None)


def _begin(store: Path, live: LiveEnvironment) -> ReadTransaction:
    """Begin a transaction on the store's current live environment. If `live` contains the note that it was replaced,
    open its successor."""
    while True:
        transaction = ReadTransaction(live)
        with damage_named(live.path):
            is_replaced = live.is_replaced(transaction.lmdb)
        if not is_replaced:
            return transaction
        later = _open_like(store, live)
        if later is live:
            return transaction  # The successor was removed by hand: continue with the open environment.
        live = later


def _read_view(
    store: Path,
    transaction: ReadTransaction,
    record: catalog.ViewRecord,
    raw: bytes,
    old: ViewVersion | None,
    shard: Shard | None,
) -> ViewVersion:
    """Return a view's version. It shares segments with the older version `old` where possible."""
    # All segments can be shared if the live environment is the same. If the environment was replaced, only the base can
    # be shared, because the base has a file of its own. The base is the last segment.
    same = slice(None) if old is not None and old.transaction.live is transaction.live else slice(-1, None)
    known = {segment.record.id: segment for segment in old.segments[same]} if old is not None else {}
    overlays = [known.get(overlay.id) or read_overlay(transaction, overlay) for overlay in record.overlays]
    base = known.get(record.base.id)
    # A damaged base is rebuilt under its old id, so equal ids do not mean equal bases.
    if base is None or base.record != record.base:
        base = read_generation(store, record.base)
    return ViewVersion(record, (*overlays, base), transaction, raw, shard)


def _open_like(store: Path, live: LiveEnvironment) -> LiveEnvironment:
    """Open the store's current live environment. Open it writable if `live` is writable, so that this process can still
    write."""
    try:
        return open_live(store, writable=live.writable)
    except StoreLocked:
        return open_live(store)  # Another thread of this process has already opened the environment for reading.


def read_overlay(transaction: ReadTransaction, record: catalog.SegmentRecord) -> Segment:
    """Read an overlay. Its chunks are views of the map, valid until the end of the transaction. Raise StoreDamaged if a
    chunk is missing or damaged."""
    live = transaction.live
    chunks = []
    for number in range(record.chunks):
        key = catalog.chunk_key(record.id, number)
        with damage_named(live.path):
            value = transaction.lmdb.get(key, db=live.segments)
        if value is None:
            raise StoreDamaged(f"{live.path} has no chunk {key.decode()}, though the catalog names it; {LOAD_AGAIN}")
        chunks.append(Chunk(value, f"{live.path} chunk {key.decode()}"))
    return Segment(record, chunks)


def read_generation(store: Path, record: catalog.SegmentRecord) -> Segment:
    """Read a base. The chunks of the base keep the base's file mapped.

    This function does not verify the checksums, because every process would then read the whole file at its start. The
    writer's scrub verifies the checksums.

    Raises:
        StoreDamaged: the file is missing, cut short, or does not match its record, or a chunk's header is invalid.
        StoreUnreadable: the operating system currently refuses to open or map the file.
    """
    path = generation_path(store, record.view_schema.name, record.id)
    content = map_generation(path)
    if len(content) < record.bytes:
        raise StoreDamaged(
            f"generation {path} has {len(content)} bytes, but its chunks alone take {record.bytes}: it was cut short; "
            f"{LOAD_AGAIN}"
        )
    chunks = [Chunk(content[offset:], f"{path} chunk {number}") for number, offset in enumerate(record.offsets)]
    rows = sum(chunk.header.rows for chunk in chunks)
    if rows != record.rows + record.tombstones:
        # An interrupted repair rebuilt the generation with other chunks, and did not update the catalog.
        raise StoreDamaged(
            f"generation {path} has {rows} rows, but the catalog says {record.rows + record.tombstones}; {LOAD_AGAIN}"
        )
    return Segment(record, chunks)
