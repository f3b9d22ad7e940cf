"""The lease on a table: the right of one process at a time to write to the table. The lease is an expiring item in the
table."""

import asyncio
import contextlib
import os
import socket
import time
import uuid
from types import TracebackType
from typing import Self

import orjson

from shoal.engine.base.errors import TableFailed, TableTaken
from shoal.engine.base.failpoints import reached
from shoal.engine.dynamodb.client import CONDITION_FAILED, DynamoClient, binary, number
from shoal.engine.dynamodb.items import KEY, LEASE

_SECONDS = 10.0
_RENEWALS = 3


class Lease:
    """The right to write to a table, as long as it is renewed.

    Conditional writes are correct even without the lease. For them, the lease only prevents two processes from paying
    for the same writes. The unconditional writes of a first load are correct only with the lease.
    """

    def __init__(self, client: DynamoClient, table: str, seconds: float) -> None:
        self._client = client
        self._table = table
        self._seconds = seconds
        self._owner = f"{socket.gethostname()}/{os.getpid()}/{uuid.uuid4().hex[:8]}"
        self._until = 0.0
        self._renewing: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Take the lease as soon as no other process has it.

        Raises:
            TableTaken: another process keeps the lease.
        """
        give_up = time.monotonic() + 2 * self._seconds
        while not await self._take("attribute_not_exists(k) OR x < :now OR o = :o"):
            if time.monotonic() > give_up:
                raise TableTaken(
                    f"table {self._table!r} is being written by {await self._holder()}; stop one of the two processes"
                )
            await asyncio.sleep(min(0.5, self._seconds / _RENEWALS))
        reached("sync.leased")
        self._renewing = asyncio.create_task(self._renew())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._renewing is not None:
            self._renewing.cancel()
        document = {
            "TableName": self._table,
            "Key": {KEY: binary(LEASE)},
            "ConditionExpression": "o = :o",
            "ExpressionAttributeValues": {":o": {"S": self._owner}},
        }
        with contextlib.suppress(TableFailed):
            await self._client.call("DeleteItem", document, _SECONDS)

    def check(self) -> None:
        """Raise TableTaken if the lease may have expired."""
        if time.monotonic() > self._until:
            raise TableTaken(
                f"the right to write to table {self._table!r} could not be renewed for {self._seconds:g} s; rows that "
                f"were written are kept, and the next attempt continues there"
            )

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._seconds / _RENEWALS)
            with contextlib.suppress(TableFailed):
                if not await self._take("o = :o"):
                    self._until = 0.0
                    return

    async def _take(self, condition: str) -> bool:
        """Write the lease item under a condition. Return whether this process now holds the lease."""
        began = time.monotonic()
        now = time.time_ns() // 1_000_000
        names = {":o": {"S": self._owner}, ":now": number(now)}
        document = {
            "TableName": self._table,
            "Item": {KEY: binary(LEASE), "o": names[":o"], "x": number(now + int(1000 * self._seconds))},
            "ConditionExpression": condition,
            "ExpressionAttributeValues": {name: value for name, value in names.items() if name in condition},
        }
        try:
            await self._client.call("PutItem", document, self._seconds / _RENEWALS)
        except TableFailed as error:
            if error.code == CONDITION_FAILED:
                return False
            if error.is_transient and self._until == 0.0:
                return False
            raise
        self._until = began + self._seconds
        return True

    async def _holder(self) -> str:
        document = {"TableName": self._table, "Key": {KEY: binary(LEASE)}, "ConsistentRead": True}
        item = (await self._client.call("GetItem", document, _SECONDS)).get("Item")
        return orjson.dumps(item["o"]["S"]).decode() if item else "somebody"
