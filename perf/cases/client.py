"""The Python client: its cost compared with the bare HTTP libraries, the cost of splitting a request over shards, and
the effect of hedged requests on the slowest answers while a replica pauses again and again.

Client and servers share the cores, so CPU time is a better measure of the client than wall time.
"""

import asyncio
import http.client
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

import aiohttp
import httpx
import numpy as np
import numpy.typing as npt
import orjson
import urllib3

from perf import servers
from perf.dataset import Dataset, document_keys, matrix, random_documents
from perf.measure import alternate, ratio
from perf.report import Finding
from perf.scale import Scale
from perf.servers import Server
from perf.stores import loaded, published
from shoal.client import Client
from shoal.client.aio import AsyncClient
from shoal.engine.base.shards import Shard
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.follow.load import NullObserver, load

FEATURES = 20
KEYS = 100
SHARDED_KEYS = 500
SHARDS = 4
PAUSE_SECONDS = 0.05
PAUSED_EVERY_SECONDS = 0.4
_HEADERS = {"Content-Type": "application/json", "Accept": "application/x-npy"}
_TIMEOUT = 60.0


def run(scale: Scale) -> list[Finding]:
    """Measure the cost of the client, the cost of shards, and the effect of hedged requests.

    Raises:
        AssertionError: an answer is wrong.
    """
    data = Dataset(scale.rows, FEATURES)
    store = loaded(scale.directory, data)
    count = 50 if scale.small else 1000
    with servers.shoal(store) as server:
        findings = _overhead(server, data, count, scale.rounds)
        findings += _sharded(scale, server, data, count // 2)
    return findings + _hedged(scale, store, data, 3 * count)


# --- beside the bare libraries -----------------------------------------------------------------------------------


def _overhead(server: Server, data: Dataset, count: int, rounds: int) -> list[Finding]:
    documents = random_documents(data, KEYS, 1)[0]
    keys = {"doc_id": document_keys(documents)}
    expected = matrix(documents, FEATURES)
    body = orjson.dumps({"features": data.references, "entities": keys})
    url = f"http://127.0.0.1:{server.port}/v1/lookup"
    loop = asyncio.new_event_loop()

    def check(content: bytes) -> None:
        if content[-expected.nbytes :] != expected.tobytes():
            raise AssertionError("the server answers wrongly")

    with ExitStack() as closing:
        plain = http.client.HTTPConnection("127.0.0.1", server.port)
        by_urllib3 = closing.enter_context(urllib3.PoolManager(retries=False))
        by_httpx = closing.enter_context(httpx.Client())
        client = closing.enter_context(Client(f"http://127.0.0.1:{server.port}", timeout=_TIMEOUT))

        def ask_plain() -> None:
            plain.request("POST", "/v1/lookup", body, _HEADERS)
            check(plain.getresponse().read())

        def ask_client() -> None:
            found = client.lookup(data.references, keys, format="npy").to_numpy()
            if not np.array_equal(found, expected):
                raise AssertionError("the client answers wrongly")

        def repeat(ask: Callable[[], object]) -> Callable[[], None]:
            def work() -> None:
                for _ in range(count):
                    ask()

            return work

        async def by_aiohttp() -> None:
            async with aiohttp.ClientSession() as session:
                for _ in range(count):
                    async with session.post(url, data=body, headers=_HEADERS) as response:
                        check(await response.read())

        async def by_httpx_asynchronously() -> None:
            async with httpx.AsyncClient() as session:
                for _ in range(count):
                    check((await session.post(url, content=body, headers=_HEADERS)).content)

        async def by_client() -> None:
            async with AsyncClient(f"http://127.0.0.1:{server.port}", timeout=_TIMEOUT) as session:
                for _ in range(count):
                    found = (await session.lookup(data.references, keys, format="npy")).to_numpy()
                    if not np.array_equal(found, expected):
                        raise AssertionError("the client answers wrongly")

        works: dict[str, Callable[[], object]] = {
            "http.client": repeat(ask_plain),
            "urllib3": repeat(lambda: check(by_urllib3.request("POST", url, body=body, headers=_HEADERS).data)),
            "httpx": repeat(lambda: check(by_httpx.post(url, content=body, headers=_HEADERS).content)),
            "Client": repeat(ask_client),
            "aiohttp": lambda: loop.run_until_complete(by_aiohttp()),
            "httpx, asyncio": lambda: loop.run_until_complete(by_httpx_asynchronously()),
            "AsyncClient": lambda: loop.run_until_complete(by_client()),
        }
        wall: dict[str, list[float]] = {name: [] for name in works}

        def subject(name: str) -> Callable[[], float]:
            def cost() -> float:
                began = time.perf_counter()
                cpu = time.process_time()
                works[name]()
                wall[name].append((time.perf_counter() - began) / count)
                return (time.process_time() - cpu) / count

            return cost

        costs = alternate({name: subject(name) for name in works}, rounds)
        loop.close()
    case = f"client, {KEYS} x {FEATURES}, npy, one request after the other"
    findings = []
    for name in works:
        findings.append(Finding(case, f"{name}, CPU", 1e6 * median(costs[name]), "µs"))
        findings.append(Finding(case, f"{name}, wall", 1e6 * median(wall[name][1:]), "µs"))
    return [
        *findings,
        Finding(case, "Client / urllib3, CPU", ratio(costs, "Client", "urllib3"), "x", at_most=1.0),
        Finding(case, "AsyncClient / aiohttp, CPU", ratio(costs, "AsyncClient", "aiohttp"), "x", at_most=1.8),
    ]


# --- over shards -------------------------------------------------------------------------------------------------


def _sharded(scale: Scale, server: Server, data: Dataset, count: int) -> list[Finding]:
    requests = random_documents(data, SHARDED_KEYS, 20)
    keys = [{"doc_id": document_keys(documents)} for documents in requests]
    expected = [matrix(documents, FEATURES) for documents in requests]
    with ExitStack() as running:
        stores = [_shard(scale.directory, data, Shard(number, SHARDS)) for number in range(1, SHARDS + 1)]
        of_shards = [running.enter_context(servers.shoal(store)) for store in stores]
        urls = [f"http://127.0.0.1:{shard.port}" for shard in of_shards]
        one = running.enter_context(Client(f"http://127.0.0.1:{server.port}", timeout=_TIMEOUT))
        many = running.enter_context(Client(shards=urls, timeout=_TIMEOUT))
        cpu: dict[str, list[float]] = {"one server": [], "shards": []}

        def subject(name: str, client: Client) -> Callable[[], float]:
            def cost() -> float:
                began = time.perf_counter()
                used = time.process_time()
                for number in range(count):
                    found = client.lookup(data.references, keys[number % 20], format="npy").to_numpy()
                    if number < 20 and not np.array_equal(found, expected[number]):
                        raise AssertionError(f"{name}: wrong answers")
                cpu[name].append((time.process_time() - used) / count)
                return (time.perf_counter() - began) / count

            return cost

        costs = alternate({"one server": subject("one server", one), "shards": subject("shards", many)}, scale.rounds)
    case = f"client, {SHARDED_KEYS} x {FEATURES}, npy, {SHARDS} shards against one server"
    return [
        *(Finding(case, f"{name}, wall", 1e6 * median(costs[name]), "µs") for name in costs),
        *(Finding(case, f"{name}, client's CPU", 1e6 * median(cpu[name][1:]), "µs") for name in cpu),
        Finding(case, "shards / one server, wall", ratio(costs, "shards", "one server"), "x"),
    ]


def _shard(directory: Path, data: Dataset, shard: Shard) -> Path:
    store = directory / f"store-{data.view}-{data.rows}x{data.features}-shard-{shard.number}-of-{shard.count}"
    if not store.exists():
        with StoreWriter(store, shard=shard) as writer:
            load(writer, published(directory, data), NullObserver())
    return store


# --- with a replica that pauses ----------------------------------------------------------------------------------


def _hedged(scale: Scale, store: Path, data: Dataset, count: int) -> list[Finding]:
    documents = random_documents(data, KEYS, 1)[0]
    keys = {"doc_id": document_keys(documents)}
    expected = matrix(documents, FEATURES)
    other = _copy(scale.directory, data)
    taken: dict[str, list[npt.NDArray[np.float64]]] = {"one request": [], "hedged": []}
    extra = []
    with servers.shoal(store) as first, servers.shoal(other) as second:
        both = [f"http://127.0.0.1:{server.port}" for server in (first, second)]
        with Client(both, timeout=_TIMEOUT) as plain, Client(both, timeout=_TIMEOUT, hedge="p95") as hedged:
            for number in range(scale.rounds + 1):
                for name, client in (("one request", plain), ("hedged", hedged)):
                    before = _lookups(both)
                    with _pausing(second):
                        latencies = []
                        for _ in range(count):
                            began = time.perf_counter()
                            found = client.lookup(data.references, keys, format="npy").to_numpy()
                            latencies.append(time.perf_counter() - began)
                            if not np.array_equal(found, expected):
                                raise AssertionError("a replica answers wrongly")
                    if number:
                        taken[name].append(np.array(latencies))
                        if name == "hedged":
                            extra.append(100 * (_lookups(both) - before - count) / count)
    case = (
        f"client, {KEYS} x {FEATURES}, npy, of two replicas one pauses for {1e3 * PAUSE_SECONDS:g} ms again and again"
    )
    findings = [
        Finding(case, f"{name}, {what}", 1e3 * median(float(np.quantile(one, share)) for one in rounds), "ms")
        for name, rounds in taken.items()
        for what, share in (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999))
    ]
    return [*findings, Finding(case, "requests besides those asked", median(extra), "%", at_most=6.0)]


def _copy(directory: Path, data: Dataset) -> Path:
    """Return a second store with the same data, for a second replica."""
    store = directory / f"store-{data.view}-{data.rows}x{data.features}-replica"
    if not store.exists():
        with StoreWriter(store) as writer:
            load(writer, published(directory, data), NullObserver())
    return store


@contextmanager
def _pausing(server: Server) -> Iterator[None]:
    """Stop the workers of a server for 50 ms again and again while the context lasts."""
    over = threading.Event()

    def pause() -> None:
        while not over.wait(PAUSED_EVERY_SECONDS - PAUSE_SECONDS):
            for worker in server.workers:
                worker.suspend()
            over.wait(PAUSE_SECONDS)
            for worker in server.workers:
                worker.resume()

    thread = threading.Thread(target=pause)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _lookups(urls: Sequence[str]) -> int:
    """Return the number of lookups that the servers have answered."""
    pattern = re.compile(r'shoal_request_duration_seconds_count\{endpoint="/v1/lookup"[^}]*\} (\S+)')
    total = 0.0
    for url in urls:
        with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
            total += sum(float(count) for count in pattern.findall(answer.read().decode()))
    return int(total)
