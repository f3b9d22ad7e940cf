"""Send lookups with shoal.client from a separate process: `python -m perf.client_load --help`.

The process may run in a network namespace."""

import json
import threading
import time
from collections import Counter
from collections.abc import Sequence

import click
import numpy as np

from perf.dataset import Dataset, document_keys, matrix, random_documents
from shoal.client import Client
from shoal.client.errors import ShoalError

_REQUESTS = 50


@click.command()
@click.option("--replica", "replicas", multiple=True, help="The address of a replica; may be given again.")
@click.option("--shard", "shards", multiple=True, help="Instead, the address of each shard, in order.")
@click.option("--rows", type=int, required=True, help="Of the data set that is asked for.")
@click.option("--features", type=int, required=True)
@click.option("--keys", type=int, required=True)
@click.option("--count", type=int, required=True, help="Requests altogether.")
@click.option("--rate", type=float, help="Requests a second, evenly; as many as are answered if not given.")
@click.option("--threads", type=int, default=2, show_default=True)
@click.option("--timeout", type=float, default=60.0, show_default=True, help="Seconds that a lookup may take.")
@click.option("--hedge", help="As the client has it.")
def main(
    replicas: Sequence[str],
    shards: Sequence[str],
    rows: int,
    features: int,
    keys: int,
    count: int,
    rate: float | None,
    threads: int,
    timeout: float,
    hedge: str | None,
) -> None:
    """Print the rate, the latencies and the failures of lookups as JSON. A latency is in seconds, and counts from the
    time at which its request was due. End with an error if an answer is wrong."""
    data = Dataset(rows, features)
    documents = random_documents(data, keys, _REQUESTS)
    entities = [{"doc_id": document_keys(some)} for some in documents]
    expected = [matrix(some, features) for some in documents]
    latencies: list[float] = []
    failures: Counter[str] = Counter()
    wrong: list[int] = []
    with Client(list(replicas) or None, shards=list(shards) or None, timeout=timeout, hedge=hedge) as client:  # type: ignore[arg-type]
        client.lookup(data.references, entities[0], format="npy", timeout=60.0)  # Opens connections, reads the schema.
        began = time.perf_counter()

        def work(first: int) -> None:
            for number in range(first, count, threads):
                due = began + number / rate if rate is not None else time.perf_counter()
                time.sleep(max(0.0, due - time.perf_counter()))
                try:
                    answer = client.lookup(data.references, entities[number % _REQUESTS], format="npy").to_numpy()
                except ShoalError as error:
                    failures[type(error).__name__] += 1
                    continue
                latencies.append(time.perf_counter() - due)
                if not np.array_equal(answer, expected[number % _REQUESTS]):
                    wrong.append(number)

        working = [threading.Thread(target=work, args=(first,)) for first in range(threads)]
        for thread in working:
            thread.start()
        for thread in working:
            thread.join()
        seconds = time.perf_counter() - began
    if wrong:
        raise click.ClickException(f"{len(wrong)} answers are wrong")
    p50, p99 = np.percentile(latencies, [50, 99]) if latencies else (None, None)
    result = {"requests_per_second": len(latencies) / seconds, "p50": p50, "p99": p99, "failures": failures}
    click.echo(json.dumps(result | {"answered": len(latencies), "slowest": max(latencies, default=None)}))


if __name__ == "__main__":
    main()
