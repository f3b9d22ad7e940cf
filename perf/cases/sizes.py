"""Cost by size: the cost of a lookup by the number of rows in the store, and of applying a delta by the delta's number
of rows."""

import tempfile
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from perf.cases.in_process import shoal_lookup
from perf.dataset import Dataset, distinct_documents, key_lists, publish_delta, random_documents
from perf.measure import Subject, alternate, ratio
from perf.report import Finding
from perf.scale import Scale
from perf.stores import check, copy_of_root, copy_of_store, loaded, published, store_path
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.follow.load import NullObserver, catch_up

FEATURES = 50
KEYS = 500
STORE_SHARES = (0.01, 0.1, 1.0)
DELTA_SHARES = (0.0001, 0.001, 0.01, 0.1)
PERCENTILES = {"p50": 50, "p95": 95, "p99": 99}


def run_stores(scale: Scale) -> list[Finding]:
    """Measure the same lookup in stores of three sizes, and in a larger store if another case has created it."""
    sizes = [int(scale.load_rows * share) for share in STORE_SHARES]
    if store_path(scale.directory, Dataset(scale.many_rows, FEATURES)).exists():
        sizes.append(scale.many_rows)
    rounds: dict[str, list[npt.NDArray[np.float64]]] = {f"{rows:,}": [] for rows in sizes}

    def subject(name: str, rows: int) -> Subject:
        data = Dataset(rows, FEATURES)
        store = loaded(scale.directory, data)
        check(store, data)
        lookup = shoal_lookup(store, data)
        requests = key_lists(random_documents(data, KEYS, scale.requests))

        def look_up() -> float:
            moments = [time.perf_counter()]
            for keys in requests:
                lookup(keys)
                moments.append(time.perf_counter())
            seconds = np.diff(moments)
            rounds[name].append(np.percentile(seconds, list(PERCENTILES.values())))
            return float(seconds.mean())

        return look_up

    costs = alternate({name: subject(name, rows) for name, rows in zip(rounds, sizes, strict=True)}, scale.rounds)
    typical = {name: 1e6 * np.median(of_rounds[1:], axis=0) for name, of_rounds in rounds.items()}
    points = [
        {"x": rows} | dict(zip(PERCENTILES, found.tolist(), strict=True))
        for rows, found in zip(sizes, typical.values(), strict=True)
    ]
    case = f"in process, {KEYS} x {FEATURES}, by size of the store"
    least, *_, most = costs
    detail = {"points": points, "x": "rows in the store", "unit": "us"}
    return [
        *(Finding(case, f"{name} rows, p50", point["p50"], "us") for name, point in zip(rounds, points, strict=True)),
        Finding(case, f"{most} rows / {least} rows", ratio(costs, most, least), "x", detail=detail),
    ]


def run_deltas(scale: Scale) -> list[Finding]:
    """Measure applying deltas of four sizes, each to the same store."""
    data = Dataset(scale.load_rows, FEATURES)
    root = published(scale.directory, data)
    store = loaded(scale.directory, data)
    sizes = [int(data.rows * share) for share in DELTA_SHARES]
    with tempfile.TemporaryDirectory(prefix="sizes-", dir=scale.directory) as temporary:

        def subject(rows: int) -> Subject:
            changed = distinct_documents(data, rows, seed=7)
            with_delta = copy_of_root(root, Path(temporary) / f"root-{rows}")
            publish_delta(with_delta, data, changed, change=1)

            def apply() -> float:
                with tempfile.TemporaryDirectory(dir=temporary) as fresh:
                    to_change = copy_of_store(store, Path(fresh))
                    with StoreWriter(to_change) as writer:
                        started = time.perf_counter()
                        catch_up(writer, with_delta, data.view, NullObserver())
                        seconds = time.perf_counter() - started
                    check(to_change, data, changed, change=1)
                return seconds

            return apply

        costs = alternate({f"{rows:,}": subject(rows) for rows in sizes}, scale.rounds)
    typical = {name: float(np.median(seconds)) for name, seconds in costs.items()}
    points = [{"x": rows, "a delta": seconds} for rows, seconds in zip(sizes, typical.values(), strict=True)]
    case = f"delta over {data.rows:,} x {FEATURES}, by its size"
    least, *_, most = costs
    detail = {"points": points, "x": "changed rows", "unit": "s"}
    return [
        *(Finding(case, f"{name} rows", seconds, "s") for name, seconds in typical.items()),
        Finding(case, f"{most} rows / {least} rows", ratio(costs, most, least), "x", detail=detail),
    ]
