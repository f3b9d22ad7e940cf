"""Requests over HTTP, one worker against one worker: Shoal, Feast's Python server on Redis, and a minimal aiohttp
server as the floor."""

import io
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from perf import servers
from perf.dataset import Dataset, document_keys, matrix, random_documents, values
from perf.measure import alternate, ratio
from perf.report import Finding
from perf.scale import Scale
from perf.servers import Outcome, Server, ask, put_under_load, write_bodies
from perf.stores import loaded

FEATURES = 50
FEAST_PATH = "/get-online-features"
FEAST_DEFAULT = ("--max-requests", "1000000")
"""A setting for Feast. By default, a worker of Feast ends itself after a thousand requests, and its last request
fails."""
FEAST_FASTEST = (*FEAST_DEFAULT, "--no-access-log", "--registry_ttl_sec", "3600")
CONNECTIONS = 4
"""The number of connections. With several connections, the server always has a request to answer. With one connection,
the server would wait while the client does its own work."""

Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Form:
    """A form of a request to Shoal: the path, the Accept header, and a function that reads the response."""

    path: str
    accept: str
    read: Callable[[bytes], Matrix]


def read_feast(body: bytes) -> Matrix:
    """Return float32[keys, features] from a response in Feast's format. Features are found by name, because Feast does
    not keep the requested order."""
    answer = orjson.loads(body)
    by_name = dict(zip(answer["metadata"]["feature_names"], answer["results"], strict=True))
    return np.array([by_name[f"f{number}"]["values"] for number in range(FEATURES)], np.float32).T


def read_npy(body: bytes) -> Matrix:
    """Return float32[keys, features] from an npy response."""
    content: Matrix = np.load(io.BytesIO(body))
    return content


def read_arrow(body: bytes) -> Matrix:
    """Return float32[keys, features] from an Arrow stream."""
    table = pa.ipc.open_stream(body).read_all()
    return np.stack([column.to_numpy() for column in table.columns], axis=1)


FORMS: Mapping[str, Form] = {
    "Feast JSON": Form(FEAST_PATH, "application/json", read_feast),
    "npy": Form("/v1/lookup", "application/x-npy", read_npy),
    "Arrow": Form("/v1/lookup", "application/vnd.apache.arrow.stream", read_arrow),
}


def run(scale: Scale) -> list[Finding]:
    """Measure requests with 500 keys and with 1 key, 50 features each, in each form."""
    data = Dataset(scale.rows, FEATURES)
    findings = []
    with ExitStack() as stack:
        shoal = stack.enter_context(servers.shoal(loaded(scale.directory, data)))
        feasts = stack.enter_context(_feasts(scale, data)) if not scale.small else {}
        for keys in (500, 1):
            findings += _compare(scale, data, keys, shoal, feasts)
    return findings


def _compare(scale: Scale, data: Dataset, keys: int, shoal: Server, feasts: Mapping[str, Server]) -> list[Finding]:
    requests = random_documents(data, keys, scale.requests // 2)
    bodies = scale.directory / f"bodies-{keys}.jsonl"
    first = write_bodies(bodies, data, requests)[0]
    count = scale.requests // 2
    # Feast is so much slower that fewer requests are enough.
    feast_count = 2 * CONNECTIONS if keys > 1 else count // 5
    wall: dict[str, Callable[[], float]] = {}
    outcomes: dict[str, list[Outcome]] = {}

    def add(name: str, server: Server, path: str, accept: str, number: int) -> None:
        def subject() -> float:
            outcome = put_under_load(server, bodies, count=number, path=path, accept=accept, connections=CONNECTIONS)
            outcomes.setdefault(name, []).append(outcome)
            return outcome.seconds_per_request

        wall[name] = subject

    with ExitStack() as stack:
        for name, form in FORMS.items():
            answer = ask(shoal, first, path=form.path, accept=form.accept)
            _check(name, form.read(answer), requests[0])
            floor_body = scale.directory / f"floor-{keys}-{name.replace(' ', '-')}"
            floor_body.write_bytes(answer)
            floor = stack.enter_context(servers.floor(floor_body))
            add(f"shoal {name}", shoal, form.path, form.accept, count)
            add(f"floor {name}", floor, form.path, form.accept, count)
        for name, feast in feasts.items():
            _check(name, read_feast(ask(feast, first, path=FEAST_PATH)), requests[0])
            add(name, feast, FEAST_PATH, "application/json", feast_count)
        costs = alternate(wall, scale.rounds)
    case = f"HTTP, {keys} x {FEATURES} of {data.rows:,}, {CONNECTIONS} connections"
    # As in `alternate`, the first round does not count.
    counted = {name: rounds[1:] for name, rounds in outcomes.items()}
    return _findings(case, keys, costs, counted, list(feasts))


def _findings(
    case: str, keys: int, costs: dict[str, list[float]], outcomes: dict[str, list[Outcome]], feasts: list[str]
) -> list[Finding]:
    findings = []
    for name, rounds in outcomes.items():
        own = 1e3 * median(outcome.cpu_per_request for outcome in rounds)
        client = 1e3 * median(outcome.client_cpu_per_request for outcome in rounds)
        findings.append(Finding(case, f"{name}: CPU a request", own, "ms"))
        findings.append(Finding(case, f"{name}: requests/s", 1 / median(costs[name]), "1/s"))
        findings.append(Finding(case, f"{name}: client CPU a request", client, "ms"))
    cpu = {name: [outcome.cpu_per_request for outcome in rounds] for name, rounds in outcomes.items()}
    floor_bars = {"Feast JSON": None, "npy": 1.7, "Arrow": 1.7} if keys > 1 else dict.fromkeys(FORMS, 1.5)
    for name, bar in floor_bars.items():
        of_floor = ratio(cpu, f"shoal {name}", f"floor {name}")
        findings.append(Finding(case, f"shoal {name} / floor, CPU", of_floor, "x", at_most=bar))
    feast_bars = {"Feast JSON": 150, "npy": 500, "Arrow": 500} if keys > 1 else dict.fromkeys(FORMS, 12)
    for feast in feasts:
        for name, least in feast_bars.items():
            times = ratio(costs, feast, f"shoal {name}")
            findings.append(Finding(case, f"shoal {name} / {feast}, requests/s", times, "x", at_least=least))
    return findings


def _check(name: str, found: Matrix, documents: npt.NDArray[np.int64]) -> None:
    if not np.array_equal(found, matrix(documents, FEATURES)):
        raise AssertionError(f"{name} answers wrongly")


@contextmanager
def _feasts(scale: Scale, data: Dataset) -> Iterator[dict[str, Server]]:
    """Run Feast's Python server on one loaded Redis, with its default settings and with those that its documentation
    recommends for speed."""
    repo = scale.directory / "feast"
    documents = _documents_file(scale.directory, data)
    with ExitStack() as stack:
        port = stack.enter_context(servers.redis(scale.directory))
        script = Path(servers.__file__).parent / "peers" / "feast_repo.py"
        where = ["--documents", str(documents), "--redis", f"127.0.0.1:{port}"]
        subprocess.run([str(servers.PEERS / "python"), str(script), str(repo), *where], check=True)
        yield {
            "Feast": stack.enter_context(servers.feast(repo, FEAST_DEFAULT)),
            "Feast, tuned": stack.enter_context(servers.feast(repo, FEAST_FASTEST)),
        }


def _documents_file(directory: Path, data: Dataset) -> Path:
    path = directory / f"documents-{data.rows}x{data.features}.parquet"
    if not path.exists():
        documents = np.arange(data.rows, dtype=np.int64)
        columns = {"doc_id": pa.array(document_keys(documents))}
        columns["event_timestamp"] = pa.array(np.full(data.rows, 1_760_000_000_000_000)).cast(pa.timestamp("us", "UTC"))
        columns |= {f"f{number}": pa.array(values(documents, number)) for number in range(data.features)}
        pq.write_table(pa.table(columns), path)
    return path
