"""Helpers for tests of tables: views in tables, the command that writes them, and the contents of tables."""

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from shoal import cli
from shoal.engine.base.errors import ShoalError
from shoal.engine.dynamodb.client import DynamoClient, binary, binary_of
from shoal.engine.dynamodb.items import KEY, KEY_BYTES, LEASE
from shoal.engine.format.schema import ViewSchema
from shoal.engine.root.export_root import ExportRoot
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.dynamodb import rows
from shoal.loaders.dynamodb.bring_local import load_table
from shoal.loaders.dynamodb.sync import Sync, Written
from shoal.loaders.dynamodb.table import Progress
from tests.s3.server import ACCESS

ENDPOINT = "AWS_ENDPOINT_URL_DYNAMODB"


def remote(view: ViewSchema, table: str) -> ViewSchema:
    """Return a copy of a view that is kept in a table."""
    return view.model_copy(update={"tier": "dynamodb", "table": table})


@dataclass(frozen=True)
class Done:
    """The exit code and the output of a finished command."""

    returncode: int
    stdout: str
    stderr: str


def shoal(*arguments: object) -> Done:
    """Run a command line in this process, because the start of a new process takes seconds."""
    result = CliRunner().invoke(cli.shoal, [str(argument) for argument in arguments])
    if isinstance(result.exception, ShoalError):
        return Done(result.exception.exit_code, result.stdout, str(result.exception))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Done(result.exit_code, result.stdout, result.stderr)


def sync(root: ExportRoot, *views: str, dry_run: bool = False, **options: float) -> list[Written]:
    """Write some views, or all, as `shoal sync-dynamodb --once` does, in this process. Return the written entries."""

    async def run() -> list[Written]:
        async with DynamoClient() as client:
            how: dict[str, Any] = {"units_per_second": 1e6, "lease_seconds": 5.0, "create_tables": True} | options
            syncing = Sync(client, root, dry_run=dry_run, **how)
            return [entry for view in views or syncing.remote_views() for entry in await syncing.catch_up(view)]

    return asyncio.run(run())


def sync_in_steps(address: str, endpoint: str, table: str) -> None:
    """Run `sync` in its own process, a few rows at a time."""
    os.environ |= {ENDPOINT: endpoint, **ACCESS}
    rows.ROWS_AT_ONCE = 40
    sync(ExportRoot(address))


def forget_lease(table: str) -> None:
    """End the lease of the process that writes to a table."""

    async def forget() -> None:
        async with DynamoClient() as client:
            await client.call("DeleteItem", {"TableName": table, "Key": {KEY: binary(LEASE)}}, 10.0)

    asyncio.run(forget())


def bring_local(store: Path, table: str) -> Progress:
    """Load a table into a store as `shoal load --from-dynamodb` does, in this process."""
    with StoreWriter(store) as writer:
        return asyncio.run(load_table(writer, table, lambda rows: None))[0]


def items(table: str) -> dict[bytes, dict[str, Any]]:
    """Return all rows of a table as they are stored, by key."""

    async def scan() -> dict[bytes, dict[str, Any]]:
        found: dict[bytes, dict[str, Any]] = {}
        async with DynamoClient() as client:
            start: dict[str, Any] = {}
            while True:
                answer = await client.call("Scan", {"TableName": table, "ConsistentRead": True} | start, 10.0)
                found |= {binary_of(item[KEY]): item for item in answer["Items"]}
                if "LastEvaluatedKey" not in answer:
                    return {key: item for key, item in found.items() if len(key) == KEY_BYTES}
                start = {"ExclusiveStartKey": answer["LastEvaluatedKey"]}

    return asyncio.run(scan())
