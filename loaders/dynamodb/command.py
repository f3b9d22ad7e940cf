"""The command `shoal sync-dynamodb`."""

import asyncio
import logging
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import click

from shoal.engine.base.errors import NotPublished, ShoalError
from shoal.engine.cli.terminal import say, say_json
from shoal.engine.dynamodb.client import DynamoClient
from shoal.engine.root.export_root import ExportRoot
from shoal.loaders.dynamodb.sync import Sync, Written

log = logging.getLogger("shoal.sync")


@click.command("sync-dynamodb", short_help="Write views of an export root to DynamoDB tables, and keep them current.")
@click.option(
    "--from", "address", required=True, metavar="ROOT", help="The export root: a directory, or s3://BUCKET/PREFIX."
)
@click.option("--view", "views", multiple=True, metavar="NAME", help="Only this view; may be repeated.")
@click.option("--once", is_flag=True, help="Exit when the tables have all entries of the root.")
@click.option("--dry-run", is_flag=True, help="Count the writes and estimate their cost, but write nothing.")
@click.option("--create-tables", is_flag=True, help="Create missing tables, billed by request.")
@click.option(
    "--units-per-second",
    type=click.FloatRange(min=0, min_open=True),
    default=1000.0,
    show_default=True,
    metavar="NUMBER",
    help="The maximum of write units per second for each table.",
)
@click.option("--poll", default=5.0, show_default=True, metavar="SECONDS", help="How often to look for new entries.")
@click.option(
    "--lease-seconds",
    type=click.FloatRange(min=0.2),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="The time after which another process may take over from one that died.",
)
@click.option(
    "--write-price",
    default=0.625,
    show_default=True,
    metavar="DOLLARS",
    help="The price of a million write units, for --dry-run.",
)
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON, one object per entry.")
def sync_dynamodb_command(
    address: str,
    views: tuple[str, ...],
    once: bool,
    dry_run: bool,
    create_tables: bool,
    units_per_second: float,
    poll: float,
    lease_seconds: float,
    write_price: float,
    as_json: bool,
) -> None:
    """Write the views with tier dynamodb of an export root to their tables, and continue as new entries are published.

    Only changed rows are written. If a run dies or is stopped, the next run continues it. Endpoint, region and
    credentials come from boto3's environment.
    """
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    log.setLevel(logging.WARNING if once or dry_run else logging.INFO)
    root = ExportRoot(address)
    root.check_may_be_root()

    async def run() -> None:
        async with DynamoClient() as client:
            sync = Sync(
                client,
                root,
                units_per_second=units_per_second,
                lease_seconds=lease_seconds,
                dry_run=dry_run,
                create_tables=create_tables,
            )
            if once or dry_run:
                await _once(sync, views, as_json, write_price if dry_run else None)
            else:
                await _follow(sync, str(root), views, as_json, poll)

    asyncio.run(run())


async def _once(sync: Sync, views: Sequence[str], as_json: bool, price: float | None) -> None:
    wanted = views or await asyncio.to_thread(sync.remote_views)
    if not wanted:
        raise NotPublished("no view of the root is kept in a table; give one the tier dynamodb in views.yaml")
    outcomes = await asyncio.gather(*(sync.catch_up(view) for view in wanted), return_exceptions=True)
    for outcome in outcomes:
        if not isinstance(outcome, BaseException):
            _print(outcome, as_json, price)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome


async def _follow(sync: Sync, address: str, views: Sequence[str], as_json: bool, poll: float) -> None:
    """Write new entries until SIGTERM or SIGINT. Retry a failed view at the next poll."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    async def one(view: str) -> None:
        try:
            _print(await sync.catch_up(view), as_json, None)
            sync.failures.succeeded(view)
        except ShoalError as error:
            sync.failures.failed(view, f"{view}: {type(error).__name__}: {error}")

    async def rounds() -> None:
        while True:
            try:
                wanted = views or await asyncio.to_thread(sync.remote_views)
                sync.failures.succeeded(address)
                await asyncio.gather(*(one(view) for view in wanted))
            except (ShoalError, OSError) as error:
                sync.failures.failed(address, str(error))
            await asyncio.sleep(poll)

    stopping = asyncio.create_task(stop.wait())
    running = asyncio.create_task(rounds())
    await asyncio.wait({stopping, running}, return_when=asyncio.FIRST_COMPLETED)
    if running.done():
        running.result()
    # Cancel the writes in progress, and release the leases.
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running


def _print(entries: Sequence[Written], as_json: bool, price: float | None) -> None:
    for entry in entries:
        document: dict[str, Any] = asdict(entry) | {"at": datetime.now(UTC).isoformat()}
        if price is not None:
            document |= {"dry_run": True, "dollars": entry.estimated_units * price / 1e6}
        if as_json:
            say_json(document, indent=None)
            continue
        would = "would take" if price is not None else "took"
        say(
            f"{entry.view}: {entry.kind} {entry.seq} to table {entry.table}: {entry.puts:,} puts, {entry.deletes:,} "
            f"deletes, {entry.unchanged:,} unchanged, {entry.superseded:,} superseded; it {would} "
            f"{entry.estimated_units:,} write units"
            + (f", {document['dollars']:.4f} dollars at {price} a million" if price is not None else "")
        )
    if price is not None and not as_json:
        total = sum(entry.estimated_units for entry in entries)
        say(f"in all {total:,} write units, {total * price / 1e6:.4f} dollars; nothing was written")
