"""A view's DynamoDB table, as its writer uses it: conditional writes at a bounded rate, with retries.

Every operation is retried after a transient failure, with exponential backoff and jitter. Retries are safe: all
operations are idempotent.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Self

from shoal.engine.base.errors import TableFailed, TableInvalid, TableMissing, TableTaken
from shoal.engine.dynamodb.client import (
    CONDITION_FAILED,
    IN_USE,
    DynamoClient,
    binary,
    binary_of,
    number,
)
from shoal.engine.dynamodb.items import (
    EVENT_TIME,
    KEY,
    KEY_BYTES,
    PROGRESS,
    SEQ,
    schema_in,
    schema_item,
    schema_key,
)
from shoal.engine.format.schema import ViewSchema
from shoal.engine.root.manifest import Manifest
from shoal.loaders.dynamodb.lease import Lease
from shoal.loaders.dynamodb.rows import Row
from shoal.loaders.follow.recurring import RecurringFailures

log = logging.getLogger("shoal.sync")

_SECONDS = 10.0
_ATTEMPTS = 12
_TOLD_ATTEMPT = 5
_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 10.0
_IN_FLIGHT = 32
_BATCH = 25
"""The most items that BatchWriteItem takes."""
_SCANS = 8
_ACTIVE_SECONDS = 120.0


@dataclass
class WriteCosts:
    """The cost of writes: row writes by kind, units, and failed attempts.

    `superseded` counts the row writes that found something newer in the table. `write_units` and `read_units` are what
    the server reports.
    """

    puts: int = 0
    deletes: int = 0
    superseded: int = 0
    estimated_units: int = 0
    write_units: float = 0.0
    read_units: float = 0.0
    retries: int = 0


@dataclass(frozen=True)
class Progress:
    """The last log entry that a table holds completely, and the view's schema."""

    seq: int
    entry: str
    view: ViewSchema
    published_at: datetime
    watermark: datetime | None

    @classmethod
    def at(cls, manifest: Manifest) -> Self:
        """Return the progress of a table that holds an entry completely."""
        return cls(manifest.seq, manifest.id, manifest.view, manifest.published_at, manifest.watermark)


@dataclass
class Pace:
    """Limits the write units per second. A burst may use the units of at most one second."""

    units_per_second: float
    _free_at: float = field(default_factory=time.monotonic)

    async def take(self, units: float) -> None:
        """Wait until a write of the given number of units may begin."""
        now = time.monotonic()
        self._free_at = max(self._free_at, now - 1.0) + units / self.units_per_second
        if self._free_at > now:
            await asyncio.sleep(self._free_at - now)


class Table:
    """The table of a view in DynamoDB.

    Args:
        pace: limits the rate of writes.
        failures: logs retried requests.
    """

    def __init__(self, client: DynamoClient, name: str, pace: Pace, failures: RecurringFailures | None = None) -> None:
        self.name = name
        self._failures = failures if failures is not None else RecurringFailures(log)
        self.spent = WriteCosts()
        self.lease: Lease | None = None
        self._client = client
        self._pace = pace
        self._in_flight = asyncio.Semaphore(_IN_FLIGHT)

    # --- reading ---------------------------------------------------------------------------------------------

    async def exists(self) -> bool:
        """Return whether the table exists."""
        try:
            await self._call("DescribeTable", {"TableName": self.name})
        except TableMissing:
            return False
        return True

    async def create(self) -> None:
        """Create the table, billed by request, if it does not exist. Return when the table can be used."""
        document = {
            "TableName": self.name,
            "AttributeDefinitions": [{"AttributeName": KEY, "AttributeType": "B"}],
            "KeySchema": [{"AttributeName": KEY, "KeyType": "HASH"}],
            "BillingMode": "PAY_PER_REQUEST",
        }
        try:
            await self._call("CreateTable", document)
        except TableFailed as error:
            if error.code != IN_USE:
                raise
        until = time.monotonic() + _ACTIVE_SECONDS
        while time.monotonic() < until:
            with contextlib.suppress(TableMissing):
                answer = await self._call("DescribeTable", {"TableName": self.name})
                if answer["Table"]["TableStatus"] == "ACTIVE":
                    return
            await asyncio.sleep(0.2)
        raise TableFailed(f"table {self.name!r} was not created within {_ACTIVE_SECONDS:g} s; check its status")

    async def check_key(self) -> None:
        """Raise TableInvalid if the table does not have the key of Shoal's tables. Raise TableMissing if the table does
        not exist."""
        answer = (await self._call("DescribeTable", {"TableName": self.name}))["Table"]
        keys = [(key["AttributeName"], key["KeyType"]) for key in answer["KeySchema"]]
        types = {one["AttributeName"]: one["AttributeType"] for one in answer["AttributeDefinitions"]}
        if keys != [(KEY, "HASH")] or types.get(KEY) != "B":
            raise TableInvalid(
                f"table {self.name!r} has the key {keys}; Shoal needs only {KEY!r}, of type binary; name another table"
            )

    async def progress(self) -> Progress | None:
        """Return the table's progress, or None if the table does not hold any entry completely.

        Raises:
            TableMissing: the table does not exist.
            TableInvalid: the item that records the progress cannot be read.
        """
        item = await self._item(PROGRESS)
        if item is None:
            return None
        try:
            view = ViewSchema.model_validate_json(item["w"]["S"])
            watermark = datetime.fromisoformat(item["m"]["S"]) if "m" in item else None
            published_at = datetime.fromisoformat(item["p"]["S"])
            return Progress(int(item["s"]["N"]), item["i"]["S"], view, published_at, watermark)
        except (KeyError, TypeError, ValueError) as error:
            raise TableInvalid(f"table {self.name!r}: its item {PROGRESS.decode()!r} cannot be read: {error}") from None

    async def scan(self, attributes: Sequence[str]) -> AsyncIterator[list[dict[str, Any]]]:
        """Yield the given attributes of all rows, in pages and in no particular order. Reads are strongly
        consistent."""
        pages: asyncio.Queue[list[dict[str, Any]] | BaseException | None] = asyncio.Queue(2 * _SCANS)

        async def read(segment: int) -> None:
            wanted = {"TableName": self.name, "ConsistentRead": True, "ProjectionExpression": ",".join(attributes)}
            wanted |= {"Segment": segment, "TotalSegments": _SCANS}
            start: Any = {}
            try:
                while True:
                    answer = await self._call("Scan", wanted | start)
                    await pages.put([item for item in answer["Items"] if len(binary_of(item[KEY])) == KEY_BYTES])
                    if "LastEvaluatedKey" not in answer:
                        break
                    start = {"ExclusiveStartKey": answer["LastEvaluatedKey"]}
                await pages.put(None)
            except Exception as error:
                await pages.put(error)

        tasks = [asyncio.create_task(read(segment)) for segment in range(_SCANS)]
        try:
            left = _SCANS
            while left:
                page = await pages.get()
                if isinstance(page, BaseException):
                    raise page
                if page is None:
                    left -= 1
                else:
                    yield page
        finally:
            for task in tasks:
                task.cancel()

    async def schema(self, schema_id: bytes) -> ViewSchema:
        """Return the schema that has a given fingerprint. Each row contains the fingerprint of the schema of its
        values.

        Raises:
            TableInvalid: the table has no description of the schema, or an invalid one.
        """
        item = await self._item(schema_key(schema_id))
        if item is None:
            raise TableInvalid(f"table {self.name!r} has rows of a schema {schema_id.hex()} that it does not describe")
        return schema_in(item, schema_id, self.name)

    async def _item(self, key: bytes) -> dict[str, Any] | None:
        document = {"TableName": self.name, "Key": {KEY: binary(key)}, "ConsistentRead": True}
        item: dict[str, Any] | None = (await self._call("GetItem", document)).get("Item")
        return item

    # --- writing ---------------------------------------------------------------------------------------------

    async def describe(self, view: ViewSchema) -> None:
        """Write a view's schema to the table. Call this before rows with this schema are written."""
        await self._call("PutItem", {"TableName": self.name, "Item": schema_item(view)})

    async def write(self, rows: Sequence[Row], seq: int, *, replaces_all: bool) -> None:
        """Write rows, and delete the items of the tombstones' keys. Skip each key if the table has a newer item for it.

        An item is newer if it is of a later entry, or has a later event time. If `replaces_all` is true, event times
        are ignored.
        """
        newer = f"{SEQ} <= :q" if replaces_all else f"{SEQ} <= :q AND {EVENT_TIME} <= :e"

        async def one(row: Row) -> None:
            values = {":q": number(seq)} if replaces_all else {":q": number(seq), ":e": number(row.event_time)}
            document: dict[str, Any] = {"TableName": self.name, "ExpressionAttributeValues": values}
            if row.value is None:
                operation, document["Key"], document["ConditionExpression"] = (
                    "DeleteItem",
                    {KEY: binary(row.key)},
                    newer,
                )
            else:
                operation, document["Item"] = "PutItem", row.item(seq)
                document["ConditionExpression"] = f"attribute_not_exists({KEY}) OR ({newer})"
            units = row.write_units(seq)
            async with self._in_flight:
                await self._pace.take(units)
                try:
                    await self._call(operation, document)
                except TableFailed as error:
                    if error.code != CONDITION_FAILED:
                        raise
                    self.spent.superseded += 1
            self.count(row, units)

        await _all(one(row) for row in rows)

    async def write_first(self, rows: Sequence[Row], seq: int) -> None:
        """Write rows like `write`, but in batches and without conditions, to a table without recorded progress."""

        async def batch(rows: Sequence[Row]) -> None:
            requests: list[dict[str, Any]] = [
                {"DeleteRequest": {"Key": {KEY: binary(row.key)}}}
                if row.value is None
                else {"PutRequest": {"Item": row.item(seq)}}
                for row in rows
            ]
            pause = _FIRST_PAUSE
            async with self._in_flight:
                await self._pace.take(sum(row.write_units(seq) for row in rows))
                while requests:
                    answer = await self._call("BatchWriteItem", {"RequestItems": {self.name: requests}})
                    requests = answer.get("UnprocessedItems", {}).get(self.name, [])
                    if requests:
                        self.spent.retries += 1
                        await asyncio.sleep(random.uniform(0, pause))
                        pause = min(2 * pause, _LONGEST_PAUSE)
            for row in rows:
                self.count(row, row.write_units(seq))

        await _all(batch(rows[start : start + _BATCH]) for start in range(0, len(rows), _BATCH))

    def count(self, row: Row, units: int) -> None:
        """Count a row as written, or as one that a dry run would write."""
        self.spent.estimated_units += units
        if row.value is None:
            self.spent.deletes += 1
        else:
            self.spent.puts += 1

    async def note(self, progress: Progress) -> None:
        """Record in the table that it holds all rows of an entry.

        Raises:
            TableTaken: the table holds a later entry: another process has written to it.
        """
        seq = progress.seq
        item = {
            KEY: binary(PROGRESS),
            "s": number(seq),
            "i": {"S": progress.entry},
            "w": {"S": progress.view.model_dump_json()},
            "p": {"S": progress.published_at.isoformat()},
        }
        if progress.watermark is not None:
            item["m"] = {"S": progress.watermark.isoformat()}
        document = {
            "TableName": self.name,
            "Item": item,
            "ConditionExpression": f"attribute_not_exists({KEY}) OR s <= :s",
            "ExpressionAttributeValues": {":s": number(seq)},
        }
        try:
            await self._call("PutItem", document)
        except TableFailed as error:
            if error.code != CONDITION_FAILED:
                raise
            raise TableTaken(
                f"table {self.name!r} holds an entry later than {seq}: another process wrote to it"
            ) from None

    async def _call(self, operation: str, document: dict[str, Any]) -> dict[str, Any]:
        """Run an operation, and retry it after transient failures."""
        if operation not in ("DescribeTable", "CreateTable"):
            document = document | {"ReturnConsumedCapacity": "TOTAL"}
        pause = _FIRST_PAUSE
        for attempt in range(1, _ATTEMPTS + 1):
            if self.lease is not None:
                self.lease.check()
            try:
                answer = await self._client.call(operation, document, _SECONDS)
            except TableFailed as error:
                if not error.is_transient or attempt == _ATTEMPTS:
                    raise
                self.spent.retries += 1
                if error.code == "Timeout" or attempt == _TOLD_ATTEMPT:
                    # Earlier attempts are not logged: throttling usually ends before this attempt.
                    message = f"table {self.name!r}: {error}; the request is retried, up to {_ATTEMPTS} times"
                    self._failures.failed(f"table {self.name!r}", message, logging.WARNING)
                await asyncio.sleep(random.uniform(0, pause))
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                self._failures.succeeded(f"table {self.name!r}")
                self._count_capacity(operation, answer.get("ConsumedCapacity"))
                return answer
        raise AssertionError("the last attempt returns or raises")

    def _count_capacity(self, operation: str, consumed: Any) -> None:
        if not consumed or self.lease is None:
            return
        units = sum(one["CapacityUnits"] for one in (consumed if isinstance(consumed, list) else [consumed]))
        if operation in ("Scan", "GetItem"):
            self.spent.read_units += units
        else:
            self.spent.write_units += units


async def _all(work: Any) -> None:
    """Run coroutines concurrently. If one fails, cancel the others and raise its error."""
    try:
        async with asyncio.TaskGroup() as group:
            for one in work:
                group.create_task(one)
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
