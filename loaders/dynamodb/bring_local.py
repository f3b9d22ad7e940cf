"""Load a DynamoDB table into the local store. The table's rows become a base generation of their view on this node.

A scan returns rows in no particular order, and there may be more rows than fit into memory. So the rows are first
partitioned by hash into files in the store's directory, and each partition is then sorted. An interrupted load leaves
its files behind, and the next load removes them.
"""

import shutil
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa

from shoal.engine.base.errors import ForeignDelta, StoreDamaged, TableInvalid, TableMissing
from shoal.engine.dynamodb.client import DynamoClient, binary_of
from shoal.engine.dynamodb.items import KEY, NAMES, ROW_AT, VALUE, fingerprint
from shoal.engine.dynamodb.segments import segments_of
from shoal.engine.format.catalog import Origin, SegmentRecord, ViewRecord
from shoal.engine.format.schema import JoinKey, ViewSchema, arrow_type
from shoal.engine.kernels.hashing import key_hashes
from shoal.engine.store.disk import make_directory, store_full_named
from shoal.loaders.apply.retention import retained
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.dynamodb.table import Pace, Progress, Table
from shoal.loaders.segments.generation import CHUNK_BYTES, GenerationBuilder, fold_id
from shoal.loaders.segments.generation import Progress as Tell
from shoal.loaders.segments.merge import Merge

_PARTS = 256
_HEAD = struct.Struct("<II")
_SCANNED = ".scanned-"


async def load_table(writer: StoreWriter, name: str, tell: Tell) -> tuple[Progress, int]:
    """Load the rows of a view from the DynamoDB table that Shoal wrote for the view.

    Afterwards, the view is kept on this node, until a later entry of the view's log moves it back to a table.

    Returns:
        The last log entry that the table held completely before its rows were read, and the number of rows.

    Raises:
        TableMissing: the table does not exist, or does not hold any log entry completely.
        TableInvalid: the table's content is not what Shoal writes.
        TableFailed: the table cannot be read; nothing was loaded.
        ForeignDelta: the store has already applied a later entry of the log.
        StoreFull: the disk is full; nothing was loaded.
    """
    async with DynamoClient() as client:
        table = Table(client, name, Pace(1.0))
        # Read the progress before the rows. Rows that are written meanwhile belong to later entries, and those entries
        # are applied again after this load.
        progress = await table.progress()
        if progress is None:
            raise TableMissing(f"table {name!r} holds no complete snapshot yet; `shoal sync-dynamodb` writes one")
        schema = progress.view.model_copy(update={"tier": "local", "table": None})
        old = writer.record(schema.name)
        if old is not None and not old.view_schema.is_remote and old.applied_seq > progress.seq:
            raise ForeignDelta(
                f"view {schema.name!r} is at seq {old.applied_seq} in {writer.store}, but table {name!r} is at "
                f"{progress.seq}; load the view from the export root, or into a new store"
            )
        parts = writer.store / f"{_SCANNED}{schema.name}"
        shutil.rmtree(parts, ignore_errors=True)
        try:
            with store_full_named(parts):
                make_directory(parts)
                await _scan(table, parts, tell)
            rows = await _build(writer, table, schema, progress, parts)
        finally:
            shutil.rmtree(parts, ignore_errors=True)
    return progress, rows


async def _scan(table: Table, parts: Path, tell: Tell) -> None:
    """Write all rows of a table to files, partitioned by the highest bits of each row's first hash."""
    with ExitStack() as stack:
        files = [stack.enter_context((parts / f"{number:03d}").open("wb")) for number in range(_PARTS)]
        async for page in table.scan((KEY, VALUE, NAMES)):
            for item in page:
                key, value, names = (binary_of(item[name]) for name in (KEY, VALUE, NAMES))
                if value[8:24] != key:
                    raise TableInvalid(f"table {table.name!r}: the item of key {key.hex()} holds a row of another key")
                # Flip the sign bit of the hash: the hash is signed, and negative hashes must come first.
                files[key[7] ^ 0x80].write(_HEAD.pack(len(value), len(names)) + value + names)
            tell(len(page))


def _read(path: Path) -> Iterator[tuple[bytes, bytes]]:
    content = path.read_bytes()
    at = 0
    while at < len(content):
        of_value, of_names = _HEAD.unpack_from(content, at)
        at += _HEAD.size
        yield content[at : at + of_value], content[at + of_value : at + of_value + of_names]
        at += of_value + of_names


async def _build(writer: StoreWriter, table: Table, schema: ViewSchema, progress: Progress, parts: Path) -> int:
    view = schema.name
    writer.check_in_place()
    builder = GenerationBuilder(writer.store, view, fold_id(progress.seq))
    schemas = {fingerprint(schema): schema}
    try:
        values: list[bytes] = []
        names: list[bytes] = []
        size = 0
        for path in sorted(parts.iterdir()):
            for value, own_names in _read(path):
                values.append(value)
                names.append(own_names)
                size += len(value) + len(own_names)
                if value[:8] not in schemas:
                    schemas[value[:8]] = await table.schema(value[:8])
            if size >= CHUNK_BYTES:
                _add(builder, schema, schemas, values, names)
                values = []
                names = []
                size = 0
        if values:
            _add(builder, schema, schemas, values, names)
        base = builder.record(
            schema,
            (Origin(kind="snapshot", seq=progress.seq, id=progress.entry),),
            first_seq=progress.seq,
            last_seq=progress.seq,
            last_entry=progress.entry,
            watermark=progress.watermark,
        )
        with writer.changing(view):
            pushed = retained(writer.readable(view), builder.segment(base), schema)

            def swap(record: ViewRecord | None) -> ViewRecord:
                builder.complete()
                return _at_table(base, record, progress, writer.kept_generations, (pushed.record,) if pushed else ())

            writer.commit_view(view, swap, pushed)
    except BaseException:
        builder.discard()
        raise
    return base.rows


def _add(
    builder: GenerationBuilder,
    schema: ViewSchema,
    schemas: dict[bytes, ViewSchema],
    values: list[bytes],
    names: list[bytes],
) -> None:
    _check_keys(schema, values, names)
    segments = segments_of(schema.name, values, schemas.__getitem__, names)
    try:
        for chunk in Merge(segments, schema).chunks(CHUNK_BYTES):
            builder.add(chunk)
    except StoreDamaged as error:
        raise TableInvalid(f"view {schema.name!r}: its table holds invalid rows: {error}") from None


def _check_keys(schema: ViewSchema, values: list[bytes], names: list[bytes]) -> None:
    """Raise TableInvalid if the hashes of a row do not match its key."""
    columns = [
        pa.array(column, arrow_type(key.type))
        for key, column in zip(schema.join_keys, _keys(schema, names), strict=True)
    ]
    first, second = key_hashes(columns)
    stored = np.frombuffer(b"".join(value[8 : ROW_AT + 8] for value in values), np.int64).reshape(-1, 2)
    if np.any(stored[:, 0] != first) or np.any(stored[:, 1] != second):
        raise TableInvalid(f"view {schema.name!r}: its table has a row with hashes that do not match its key")


def _keys(schema: ViewSchema, names: list[bytes]) -> list[list[str | int]]:
    """Return one list per join key with its values, decoded from the format of keys in segments.

    See `shoal.engine.store.segment.Chunk.key_of` for the format.
    """
    columns: list[list[str | int]] = [[] for _ in schema.join_keys]
    try:
        for key in names:
            at = 0
            for column, join_key in zip(columns, schema.join_keys, strict=True):
                value, at = _key_value(join_key, key, at)
                column.append(value)
    except (struct.error, UnicodeDecodeError) as error:
        raise TableInvalid(f"view {schema.name!r}: its table has an invalid key: {error}") from None
    return columns


def _key_value(key: JoinKey, content: bytes, at: int) -> tuple[str | int, int]:
    if key.type == "int64":
        return struct.unpack_from("<q", content, at)[0], at + 8
    (size,) = struct.unpack_from("<I", content, at)
    return content[at + 4 : at + 4 + size].decode(), at + 4 + size


def _at_table(
    base: SegmentRecord,
    record: ViewRecord | None,
    progress: Progress,
    most_kept: int,
    overlays: tuple[SegmentRecord, ...],
) -> ViewRecord:
    now = datetime.now(UTC)
    kept = (record.base, *record.kept)[:most_kept] if record is not None and not record.view_schema.is_remote else ()
    return ViewRecord(
        view_schema=base.view_schema,
        base=base,
        overlays=overlays,
        kept=kept,
        applied_seq=progress.seq,
        applied_entry=progress.entry,
        published_at=progress.published_at,
        applied_at=now,
        watermark=progress.watermark,
    )
