"""The memory of a row and the CPU time of a request: one worker of Shoal over HTTP against Redis with packed rows.

`perf.capacity` computes the numbers of nodes and the costs from these figures.
"""

from statistics import median
from typing import Any

import numpy as np
import redis

from perf import servers
from perf.cases.http import CONNECTIONS, FORMS
from perf.cases.peers import blocks
from perf.dataset import Dataset, document_keys, matrix, random_documents
from perf.measure import alternate, ratio
from perf.report import Finding
from perf.scale import Scale
from perf.servers import ask, put_under_load, write_bodies
from perf.stores import loaded, stored_bytes

FEATURES = 50
KEYS = 500


def run(scale: Scale) -> list[Finding]:
    """Measure the bytes per row, and the server's CPU time per request with 500 keys."""
    data = Dataset(scale.rows, FEATURES)
    store = loaded(scale.directory, data)
    requests = random_documents(data, KEYS, scale.requests // 2)
    bodies = scale.directory / f"bodies-{KEYS}.jsonl"
    form = FORMS["npy"]
    first = write_bodies(bodies, data, requests)[0]
    keys = [document_keys(documents) for documents in requests]
    with servers.shoal(store) as shoal, servers.redis(scale.directory) as port:
        client: Any = redis.Redis(port=port)
        empty = client.info("memory")["used_memory"]
        for block, rows in blocks(data):
            client.mset({key: row.tobytes() for key, row in zip(block, rows, strict=True)})
        redis_row = (client.info("memory")["used_memory"] - empty) / data.rows
        expected = matrix(requests[0], FEATURES)
        found = np.frombuffer(b"".join(client.mget(keys[0])), np.float32).reshape(expected.shape)
        for answer in (found, form.read(ask(shoal, first, path=form.path, accept=form.accept))):
            if not np.array_equal(answer, expected):
                raise AssertionError("an answer is wrong")

        def of_shoal() -> float:
            outcome = put_under_load(
                shoal, bodies, count=len(requests), path=form.path, accept=form.accept, connections=CONNECTIONS
            )
            return outcome.cpu_per_request

        def of_redis() -> float:
            before = _cpu(client)
            for asked in keys:
                client.mget(asked)
            return (_cpu(client) - before) / len(keys)

        costs = alternate({"shoal": of_shoal, "Redis": of_redis}, scale.rounds)
    case = f"{KEYS} x {FEATURES} of {data.rows:,}, one server each"
    return [
        Finding(case, "shoal: bytes a row", stored_bytes(store, data.view) / data.rows, "B"),
        Finding(case, "Redis, packed rows: bytes a row", redis_row, "B"),
        Finding(case, "shoal npy: CPU a request", 1e3 * median(costs["shoal"]), "ms"),
        Finding(case, "Redis, MGET: CPU a request", 1e3 * median(costs["Redis"]), "ms"),
        Finding(case, "shoal npy / Redis, CPU", ratio(costs, "shoal", "Redis"), "x"),
    ]


def _cpu(client: Any) -> float:
    used = client.info("cpu")
    return float(used["used_cpu_user"]) + float(used["used_cpu_sys"])
