"""Compute the nodes, the memory and the costs of a store: `python -m perf.capacity --help`.

The cost of a row and a request, in Shoal and Redis, was measured by this project's benchmarks. Prices are list prices.
docs/capacity.md names their sources; this command writes the table on that page.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import click

from perf.markdown import put_into

BEGIN, END = "<!-- capacity -->", "<!-- /capacity -->"

HOURS_A_MONTH = 730
SECONDS_A_MONTH = HOURS_A_MONTH * 3600
DAYS_A_MONTH = SECONDS_A_MONTH / 86_400

ROW_OVERHEAD_BYTES = 52
"""The bytes that a row takes in a store in addition to its features. A row with 50 float32 features takes 252 bytes (in
10,000,000 rows). A row with 20 float32 features takes 133 bytes (in 100,000,000 rows)."""
WRITTEN_ANEW = 2.25
"""The memory of a node as a multiple of its data, if no lookup may wait for the disk. This memory holds the base,
overlays of up to a quarter of the base, and the new base or snapshot while it is written."""
WRITTEN_ELSEWHERE = 1.3
"""The memory of a node as a multiple of its data, if lookups may wait for the disk while a base is written and
activated."""
REQUEST_CPU_SECONDS_A_KEY = 0.22e-3 / 500
"""The CPU time of one worker per key, for npy responses and 50 float32 features per key. A request of 500 keys took
0.18 ms with a store of 1,000,000 rows, and 0.04 ms more with a store that takes all of the memory."""
MOST_BUSY = 0.5
"""The share of a node's cores that requests may take at peak load while one of the replicas is missing."""

REDIS_ROW_BYTES = 97
"""The bytes that Redis 7.0 takes for a key `doc_…` of about ten bytes in addition to its value: 297 bytes with a value
of 200 bytes."""
REDIS_REQUEST_CPU_SECONDS_A_KEY = 2.5 * 0.18e-3 / 500
"""The CPU time of Redis's single thread per key, for an MGET of values of 200 bytes: 2.5 times the time of Shoal,
measured side by side."""
REDIS_USABLE = 0.75
"""The share of a node's memory that keys may take. ElastiCache reserves the rest for forks and buffers."""

DYNAMODB_ITEM_OVERHEAD_BYTES = 100 + 16 + 30
"""The bytes of an item in addition to its values: 100 for Amazon's index, then the key, the names, and the attributes
for conditional writes."""

DYNAMODB_READ = 0.125e-6
DYNAMODB_WRITE = 0.625e-6
DYNAMODB_GB_MONTH = 0.25
ELASTICACHE_GB_HOUR = 0.084
ELASTICACHE_UNIT = 0.0023e-6


@dataclass(frozen=True)
class Machine:
    """An Amazon instance type, with its list price in dollars per hour."""

    name: str
    cores: int
    gib: int
    hourly: float

    @property
    def bytes(self) -> int:
        return self.gib << 30


MACHINES = (
    Machine("r6a.large", 2, 16, 0.1134),
    Machine("r6a.xlarge", 4, 32, 0.2268),
    Machine("r6a.2xlarge", 8, 64, 0.4536),
    Machine("r6a.4xlarge", 16, 128, 0.9072),
    Machine("r6a.8xlarge", 32, 256, 1.8144),
    Machine("r6a.12xlarge", 48, 384, 2.7216),
    Machine("r6a.16xlarge", 64, 512, 3.6288),
    Machine("r6a.24xlarge", 96, 768, 5.4432),
    Machine("r6a.32xlarge", 128, 1024, 7.2576),
)


@dataclass(frozen=True)
class Load:
    """The size and the load of a store. At peak load, `requests` requests of `keys` keys arrive per second. The average
    load is `mean_share` of the peak load. `changed_share` is the share of rows that change per day."""

    rows: float
    features: int
    requests: float
    keys: int
    replicas: int
    mean_share: float
    changed_share: float

    @property
    def value_bytes(self) -> int:
        return 4 * self.features

    @property
    def keys_a_month(self) -> float:
        return self.requests * self.mean_share * self.keys * SECONDS_A_MONTH

    @property
    def changes_a_month(self) -> float:
        return self.rows * self.changed_share * DAYS_A_MONTH


@dataclass(frozen=True)
class Cluster:
    """A number of equal machines: `shards` shards, with `replicas` replicas of each shard."""

    machine: Machine
    shards: int
    replicas: int

    @property
    def nodes(self) -> int:
        return self.shards * self.replicas

    @property
    def monthly(self) -> float:
        return self.nodes * self.machine.hourly * HOURS_A_MONTH

    def __str__(self) -> str:
        sharded = f"{self.shards} shards x {self.replicas}" if self.shards > 1 else str(self.replicas)
        return f"{sharded} {self.machine.name}"


def shoal(load: Load, room: float = WRITTEN_ANEW) -> Cluster:
    """Return a cluster that has memory for `room` times the data, and enough cores for the peak load."""
    memory = load.rows * (ROW_OVERHEAD_BYTES + load.value_bytes) * room
    survivors = max(1, load.replicas - 1)
    cores = load.requests * load.keys * REQUEST_CPU_SECONDS_A_KEY / survivors / MOST_BUSY
    return _cluster(memory, cores, load.replicas)


def redis(load: Load) -> Cluster:
    """Return the cluster that Redis needs with the same number of replicas. All replicas answer, with one process per
    busy core."""
    memory = load.rows * (REDIS_ROW_BYTES + load.value_bytes) / REDIS_USABLE
    survivors = max(1, load.replicas - 1)
    cores = load.requests * load.keys * REDIS_REQUEST_CPU_SECONDS_A_KEY / survivors / MOST_BUSY
    return _cluster(memory, cores, load.replicas)


def _cluster(memory: float, cores: float, replicas: int) -> Cluster:
    """Return the cluster with the fewest possible shards, on the smallest sufficient machine."""
    largest = MACHINES[-1]
    shards = max(1, ceil(memory / largest.bytes), ceil(cores / largest.cores))
    fitting = (m for m in MACHINES if m.bytes * shards >= memory and m.cores * shards >= cores)
    return Cluster(next(fitting), shards, replicas)


def dynamodb(load: Load) -> dict[str, float]:
    """Return the costs of DynamoDB on demand in dollars per month: storage, eventually consistent reads, and writes of
    the changed rows."""
    item = load.value_bytes + DYNAMODB_ITEM_OVERHEAD_BYTES
    reads = load.keys_a_month * 0.5 * ceil(item / 4096)
    units = ceil(item / 1024)
    return {
        "stored": load.rows * item / 1e9 * DYNAMODB_GB_MONTH,
        "read": reads * DYNAMODB_READ,
        "written": load.changes_a_month * units * DYNAMODB_WRITE,
        "written, all rows a day": load.rows * DAYS_A_MONTH * units * DYNAMODB_WRITE,
    }


def elasticache(load: Load) -> dict[str, float]:
    """Return the costs of ElastiCache Serverless with Valkey in dollars per month: storage, and one unit per KB read or
    written."""
    stored = load.rows * (REDIS_ROW_BYTES + load.value_bytes) / 1e9
    moved = (load.keys_a_month + load.changes_a_month) * load.value_bytes / 1024
    return {"stored": stored * ELASTICACHE_GB_HOUR * HOURS_A_MONTH, "units": moved * ELASTICACHE_UNIT}


def tables(loads: Sequence[Load]) -> str:
    """Return the figures of some loads as a Markdown table."""
    lines = [
        "| entities | requests/s | Shoal | a month | if lookups may wait | Redis, same machines | a month | "
        "ElastiCache Serverless | DynamoDB, changes written | all rows written daily |",
        "|---:|---:|---|---:|---:|---|---:|---:|---:|---:|",
    ]
    for load in loads:
        ours = shoal(load)
        patient = shoal(load, WRITTEN_ELSEWHERE)
        theirs = redis(load)
        bill = dynamodb(load)
        kept = bill["stored"] + bill["read"]
        money = [_dollars(amount) for amount in (ours.monthly, patient.monthly, theirs.monthly)]
        rented = [sum(elasticache(load).values()), kept + bill["written"], kept + bill["written, all rows a day"]]
        cells = [f"{load.rows:,.0f}", f"{load.requests:,.0f}", str(ours), *money[:2], str(theirs), money[2]]
        lines.append(f"| {' | '.join([*cells, *map(_dollars, rented)])} |")
    return "\n".join(lines)


def _dollars(amount: float) -> str:
    return f"${round(amount, -2):,.0f}" if amount >= 10_000 else f"${round(amount, -1):,.0f}"


@click.command()
@click.option("--entities", "sizes", type=float, multiple=True, default=(1e8, 1e9, 1e10), help="May be given again.")
@click.option("--features", type=int, default=50, show_default=True, help="float32 of each.")
@click.option(
    *("--requests", "rates"), type=float, multiple=True, default=(1e3, 1e4), help="A second, at the peak; likewise."
)
@click.option("--keys", type=int, default=500, show_default=True, help="Of a request.")
@click.option("--replicas", type=int, default=3, show_default=True, help="Copies of everything.")
@click.option("--mean", "mean_share", type=float, default=0.4, show_default=True, help="Of the peak, over a month.")
@click.option("--changed", "changed_share", type=float, default=0.01, show_default=True, help="Of the rows, in a day.")
@click.option(
    "--into", "page", type=click.Path(exists=True, path_type=Path), help=f"Put them between {BEGIN} and {END}."
)
def main(
    sizes: Sequence[float],
    features: int,
    rates: Sequence[float],
    keys: int,
    replicas: int,
    mean_share: float,
    changed_share: float,
    page: Path | None,
) -> None:
    """Print the nodes and the costs of stores of the given sizes."""
    printed = tables(
        [Load(rows, features, rate, keys, replicas, mean_share, changed_share) for rows in sizes for rate in rates]
    )
    if page is None:
        click.echo(printed)
        return
    put_into(page, printed, BEGIN, END)


if __name__ == "__main__":
    main()
