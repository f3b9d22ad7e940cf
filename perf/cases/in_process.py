"""Lookups in one process, from a list of str: against a get per key from LMDB, Redis, RocksDB, and a dict with take."""

from collections.abc import Callable
from pathlib import Path

import lmdb
import numpy as np
import numpy.typing as npt

from engine import FeatureStore
from perf.dataset import Dataset, document_keys, key_lists, matrix, random_documents, values
from perf.measure import Subject, alternate, ratio, seconds_each
from perf.report import Finding
from perf.scale import Scale
from perf.stores import loaded

KEYS = 500
FEATURES = 50

Lookup = Callable[[list[str]], npt.NDArray[np.floating]]
"""Keys → float32[keys, features]."""


def run(scale: Scale) -> list[Finding]:
    """The in-process bars."""
    data = Dataset(scale.rows, FEATURES)
    requests = random_documents(data, KEYS, scale.requests)
    keys = key_lists(requests)
    lookups: dict[str, Lookup] = {
        "shoal": shoal_lookup(loaded(scale.directory, data), data),
        "py-lmdb gets": lmdb_lookup(scale.directory / "peer-lmdb", data),
        "dict and take": dict_lookup(data),
        "dict and take of columns": dict_columns_lookup(data),
    }
    for name, lookup in lookups.items():
        check(name, lookup, keys[0], requests[0])
    subjects = {name: _subject(lookup, keys) for name, lookup in lookups.items()}
    costs = alternate(subjects, scale.rounds)
    bars = {"py-lmdb gets": 1 / 6, "dict and take of columns": 1 / 5}
    case = f"in process, {KEYS} x {FEATURES} of {scale.rows:,}"
    findings = [Finding(case, name, 1e6 * float(np.median(costs[name])), "us") for name in lookups]
    return findings + [
        Finding(case, f"shoal / {peer}", ratio(costs, "shoal", peer), "x", at_most=bars.get(peer))
        for peer in list(lookups)[1:]
    ]


def run_many_rows(scale: Scale) -> list[Finding]:
    """The same lookups in a store too large for the caches."""
    stores = {rows: Dataset(rows, FEATURES) for rows in (scale.rows, scale.many_rows)}
    subjects = {}
    for rows, data in stores.items():
        requests = random_documents(data, KEYS, scale.requests)
        lookup = shoal_lookup(loaded(scale.directory, data), data)
        check("shoal", lookup, document_keys(requests[0]), requests[0])
        subjects[f"{rows:,}"] = _subject(lookup, key_lists(requests))
    costs = alternate(subjects, scale.rounds)
    few, many = subjects
    case = f"in process, {KEYS} x {FEATURES}"
    return [
        *(Finding(case, f"{name} rows", 1e6 * float(np.median(costs[name])), "us") for name in subjects),
        Finding(case, f"{many} rows / {few} rows", ratio(costs, many, few), "x", at_most=2.0),
    ]


def check(name: str, lookup: Lookup, keys: list[str], documents: npt.NDArray[np.int64]) -> None:
    """Hold a lookup's answer against the formula."""
    if not np.array_equal(lookup(keys), matrix(documents, FEATURES)):
        raise AssertionError(f"{name} answers wrongly")


def _subject(lookup: Lookup, keys: list[list[str]]) -> Subject:
    return lambda: seconds_each(lambda number: lookup(keys[number]), len(keys))


def shoal_lookup(store: Path, data: Dataset) -> Lookup:
    """Shoal's own."""
    opened, references = FeatureStore.open(store), data.references
    return lambda keys: opened.lookup_matrix(references, {"doc_id": keys}).matrix


def lmdb_lookup(directory: Path, data: Dataset) -> Lookup:
    """A get per key of a row of bytes, then one array."""
    env = lmdb.open(str(directory), map_size=64 << 30, sync=False, readahead=False)
    if env.stat()["entries"] != data.rows:
        for start in range(0, data.rows, 100_000):
            documents = np.arange(start, min(start + 100_000, data.rows), dtype=np.int64)
            rows = matrix(documents, FEATURES)
            with env.begin(write=True) as transaction:
                for key, row in zip(document_keys(documents), rows, strict=True):
                    transaction.put(key.encode(), row.tobytes())

    def lookup(keys: list[str]) -> npt.NDArray[np.float32]:
        with env.begin(buffers=True) as transaction:
            rows = [transaction.get(key.encode()) or b"" for key in keys]
            return np.frombuffer(b"".join(rows), np.float32).reshape(len(keys), FEATURES)

    return lookup


def dict_lookup(data: Dataset) -> Lookup:
    """Positions in a dict, rows in one array."""
    documents = np.arange(data.rows, dtype=np.int64)
    position = {key: row for row, key in enumerate(document_keys(documents))}
    rows = matrix(documents, FEATURES)
    return lambda keys: rows.take([position[key] for key in keys], axis=0)


def dict_columns_lookup(data: Dataset) -> Lookup:
    """Positions in a dict, each feature in an array of its own, as a data frame has them."""
    documents = np.arange(data.rows, dtype=np.int64)
    position = {key: row for row, key in enumerate(document_keys(documents))}
    columns = [values(documents, feature) for feature in range(data.features)]

    def lookup(keys: list[str]) -> npt.NDArray[np.floating]:
        rows = np.array([position[key] for key in keys])
        return np.stack([column.take(rows) for column in columns], axis=1)

    return lookup
