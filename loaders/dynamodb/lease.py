"""The right to write to a table, which one process has at a time: an item of the table itself, with an end."""

import asyncio
import contextlib
import os
import socket
import time
import uuid
from types import TracebackType
from typing import Self

import orjson

from engine.dynamodb.client import CONDITION_FAILED, DynamoClient, binary, number
from engine.dynamodb.items import KEY, LEASE
from engine.errors import TableFailed, TableTaken
from engine.failpoints import reached

_SECONDS = 10.0
_RENEWALS = 3


class Lease:
    """The right to write to a table, for as long as it is renewed. Writes that are conditional need it only lest two
    processes pay for the same; those of a first load need it to be right."""

    def __init__(self, client: DynamoClient, table: str, seconds: float) -> None:
        self._client = client
        self._table = table
        self._seconds = seconds
        self._owner = f"{socket.gethostname()}/{os.getpid()}/{uuid.uuid4().hex[:8]}"
        self._until = 0.0
        self._renewing: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Take it, once nobody else has it.

        Raises:
            TableTaken: somebody keeps it.
        """
        give_up = time.monotonic() + 2 * self._seconds
        while not await self._take("attribute_not_exists(k) OR x < :now OR o = :o"):
            if time.monotonic() > give_up:
                raise TableTaken(
                    f"table {self._table!r} is being written by {await self._holder()}; let one process do so"
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
        """Raises TableTaken if it may have lapsed."""
        if time.monotonic() > self._until:
            raise TableTaken(
                f"the right to write to table {self._table!r} could not be renewed for {self._seconds:g} s; what "
                f"was written stands, and writing goes on from there"
            )

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._seconds / _RENEWALS)
            with contextlib.suppress(TableFailed):
                if not await self._take("o = :o"):
                    self._until = 0.0
                    return

    async def _take(self, condition: str) -> bool:
        """Whether it is held from now on."""
        began, now = time.monotonic(), time.time_ns() // 1_000_000
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
