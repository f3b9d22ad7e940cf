"""Lookups in one process, from a list of str: Shoal against LMDB with one get per key, Redis, RocksDB, and a dict with
NumPy's take."""

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt

from perf.cases import peers
from perf.dataset import Dataset, document_keys, key_lists, matrix, random_documents
from perf.lookups import Lookup
from perf.measure import Subject, alternate, ratio, seconds_each
from perf.report import Finding
from perf.scale import Scale
from perf.stores import loaded
from shoal import FeatureStore

KEYS = 500
FEATURES = 50

BARS = {
    "py-lmdb, a get a key": 1 / 6,
    "Redis, MGET of packed rows": 1 / 8,
    "dict, take from 50 columns": 1 / 5,
}


def run(scale: Scale) -> list[Finding]:
    """Measure the lookups of Shoal and its alternatives, and compare them with the targets for lookups in process."""
    data = Dataset(scale.rows, FEATURES)
    requests = random_documents(data, KEYS, scale.requests)
    keys = key_lists(requests)
    with ExitStack() as stack:
        lookups: dict[str, Lookup] = {
            "shoal": shoal_lookup(loaded(scale.directory, data), data),
            "py-lmdb, a get a key": peers.lmdb_gets(scale.directory, data),
            "rocksdict, multi_get": peers.rocksdb_multi_get(scale.directory, data),
            "dict, take from one array": peers.dict_of_rows(data),
            "dict, take from 50 columns": peers.dict_of_columns(data),
            "NumPy take of known rows": known_rows(requests),
        }
        if shutil.which("redis-server"):
            lookups |= stack.enter_context(peers.redis_lookups(scale.directory, data))
        else:
            click.echo("left out: Redis, since there is no redis-server (apt-get install redis-server)", err=True)
        for name, lookup in lookups.items():
            check(name, lookup, keys[0], requests[0])
        costs = alternate({name: _subject(lookup, keys) for name, lookup in lookups.items()}, scale.rounds)
    case = f"in process, {KEYS} x {FEATURES} of {scale.rows:,}"
    findings = [Finding(case, name, 1e6 * float(np.median(costs[name])), "us") for name in lookups]
    return findings + [
        Finding(case, f"shoal / {peer}", ratio(costs, "shoal", peer), "x", at_most=BARS.get(peer))
        for peer in list(lookups)[1:]
    ]


def known_rows(requests: Sequence[npt.NDArray[np.int64]]) -> Lookup:
    """Return the floor: a lookup that already knows the row numbers, and only takes the rows from one array."""
    rows = matrix(np.arange(max(int(documents.max()) for documents in requests) + 1, dtype=np.int64), FEATURES)
    documents_of = {document_keys(documents)[0]: documents for documents in requests}
    return lambda keys: rows.take(documents_of[keys[0]], axis=0)


def run_many_rows(scale: Scale) -> list[Finding]:
    """Measure the same lookups in a store that is too large for the CPU caches."""
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
    """Check the answer of a lookup with the formula."""
    if not np.array_equal(lookup(keys), matrix(documents, FEATURES)):
        raise AssertionError(f"{name} answers wrongly")


def _subject(lookup: Lookup, keys: list[list[str]]) -> Subject:
    return lambda: seconds_each(lambda number: lookup(keys[number]), len(keys))


def shoal_lookup(store: Path, data: Dataset) -> Lookup:
    """Return the lookup of Shoal in a store."""
    opened = FeatureStore.open(store)
    references = data.references
    return lambda keys: opened.lookup_matrix(references, {"doc_id": keys}).matrix
