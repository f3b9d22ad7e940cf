"""A view in a DynamoDB table against the same view on the node: the speed of writing, and the latency of lookups.

dynalite, a Node.js process on this machine, serves the table and keeps its items in memory. The CPU time of the
benchmark's own process is reported separately, so that it does not include dynalite's cost. Hedging is measured over a
simulated network that delays some answers.
"""

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from perf.dataset import Dataset, key_lists, matrix, publish_state, random_documents
from perf.report import Finding
from perf.scale import Scale
from perf.stores import bring_up_to_date
from shoal import FeatureStore
from shoal.engine.dynamodb.client import DynamoClient
from shoal.engine.format.schema import ViewSchema
from shoal.engine.root.export_root import ExportRoot
from shoal.loaders.dynamodb.sync import Sync, Written
from tests.dynamodb.server import ACCESS, dynalite, running
from tests.faulty_network import faulty_network

ENDPOINT = "AWS_ENDPOINT_URL_DYNAMODB"
FEATURES = 50
KEYS = 100
SLOW = ((0.02, 0.3), (1.0, 0.1))
"""The cases of late answers: the share of answers that are late, and their delay in seconds."""
HEDGE_SECONDS = 0.06


@dataclass(frozen=True)
class _InTable(Dataset):
    """A data set with a view that is stored in a DynamoDB table."""

    @property
    def schema(self) -> ViewSchema:
        return super().schema.model_copy(update={"tier": "dynamodb", "table": f"perf.{self.view}"})


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def run(scale: Scale) -> list[Finding]:
    """Measure writing to the table, and lookups on the node, in the table and in the cache. Also measure lookups in the
    table with and without hedging."""
    command = dynalite()
    if command is None:
        raise FileNotFoundError("there is no server of DynamoDB's interface; `make .dynamodb-server/installed`")
    rows, requests = (500, 20) if scale.small else (20_000, 400)
    here = Dataset(rows, FEATURES, "docs")
    there = _InTable(rows, FEATURES, "far")
    directory = scale.directory / "dynamodb"
    directory.mkdir(exist_ok=True)
    root = ExportRoot(directory / "root")
    for data in (here, there):
        publish_state(root, data, np.zeros(rows, np.int64), np.full(rows, 10**15, np.int64))
    with running(command, directory / "log") as url, _environment(**ACCESS, **{ENDPOINT: url}):
        findings = _writing(root, there, rows)
        bring_up_to_date(directory / "store", root)
        store = directory / "store"
        documents = random_documents(here, KEYS, requests)
        keys = key_lists(documents)
        case = f"in process, {KEYS} x {FEATURES} of {rows:,}"
        opened = FeatureStore.open(store)
        with_cache = FeatureStore.open(store, cache_seconds=3600.0)
        found = opened.lookup_matrix(there.references, {"doc_id": keys[0]}).matrix
        if not np.array_equal(found, matrix(documents[0], FEATURES)):
            raise AssertionError("lookups from the table answer wrongly")
        local = _lookups(opened, here, keys)
        remote = _lookups(opened, there, keys)
        _lookups(with_cache, there, keys)
        time.sleep(0.5)  # The last rows are put into the cache after their lookups have returned.
        cached = _lookups(with_cache, there, keys)
        for name, times in (("on the node", local), ("from the table", remote), ("from the cache", cached)):
            findings += _figures(case, name, times)
        with faulty_network(url) as network, _environment(**{ENDPOINT: network.url}):
            for share, late in SLOW:
                fault = network.fail(method="POST", text="BatchGetItem", chance=share, late=late, times=float("inf"))
                case = f"the same, {share:.0%} of answers {1e3 * late:.0f} ms late"
                for name, hedge in (
                    ("not hedged", None),
                    (f"hedged after {1e3 * HEDGE_SECONDS:.0f} ms", HEDGE_SECONDS),
                ):
                    reader = FeatureStore.open(store, hedge_seconds=hedge)
                    reader.lookup_matrix(there.references, {"doc_id": keys[0]})
                    before = len(network.requests)
                    findings += _figures(case, name, _lookups(reader, there, keys))
                    more = (len(network.requests) - before) / len(keys) - 1
                    findings.append(Finding(case, f"{name}: more requests", 100 * more, "%"))
                network.faults.remove(fault)
    return findings


@dataclass(frozen=True)
class _Times:
    """The wall time of each lookup, and the mean CPU time of the benchmark's process per lookup, both in seconds."""

    each: list[float]
    cpu: float


def _lookups(store: FeatureStore, data: Dataset, keys: list[list[str]]) -> _Times:
    each = []
    cpu = time.process_time()
    for of_request in keys:
        started = time.perf_counter()
        result = store.lookup_matrix(data.references, {"doc_id": of_request}, remote_timeout=5.0)
        each.append(time.perf_counter() - started)
        if result.partial:
            raise AssertionError("rows did not come in time")
    return _Times(each, (time.process_time() - cpu) / len(keys))


def _figures(case: str, name: str, times: _Times) -> list[Finding]:
    return [
        Finding(case, f"{name}: p50", 1e3 * float(np.percentile(times.each, 50)), "ms"),
        Finding(case, f"{name}: p99", 1e3 * float(np.percentile(times.each, 99)), "ms"),
        Finding(case, f"{name}: CPU of this process", 1e3 * times.cpu, "ms"),
    ]


def _writing(root: ExportRoot, data: Dataset, rows: int) -> list[Finding]:
    """Measure how fast three entries are written: the first snapshot, a delta with a tenth of the rows, and a snapshot
    that changes only these rows."""
    findings = []

    def write(name: str, count: Callable[[Written], int]) -> None:
        started = time.perf_counter()
        cpu = time.process_time()
        (entry,) = asyncio.run(_catch_up(root, data.view))
        seconds = time.perf_counter() - started
        spent = time.process_time() - cpu
        case = f"a table of {rows:,} x {FEATURES}, {name}"
        findings.append(Finding(case, "rows a second", count(entry) / seconds, "rows/s"))
        findings.append(Finding(case, "CPU of this process a row", 1e6 * spent / count(entry), "us"))
        findings.append(Finding(case, "write units", entry.write_units, "units"))

    write("the first snapshot, in batches", lambda entry: entry.puts)
    changed = np.arange(rows // 10, dtype=np.int64)
    changes = np.zeros(rows, np.int64)
    times = np.full(rows, 10**15, np.int64)
    changes[changed] = 1
    publish_state(root, data, changes, times + 1, changed)
    write("a delta of a tenth, conditional", lambda entry: entry.puts)
    changes[changed], times[changed] = 0, 10**15 + 2
    publish_state(root, data, changes, times)
    write("a snapshot in which that tenth is otherwise", lambda entry: entry.puts + entry.unchanged)
    return findings


async def _catch_up(root: ExportRoot, view: str) -> list[Written]:
    async with DynamoClient() as client:
        sync = Sync(client, root, units_per_second=1e9, lease_seconds=30.0, create_tables=True)
        return await sync.catch_up(view)
