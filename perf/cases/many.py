"""One store of a hundred million rows: load, open and serve the store, look up rows with a cold and with a warm page
cache, and change 1% of the rows.

This case takes minutes and tens of gigabytes, so it runs only when it is named.
"""

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import click
import numpy as np

from perf import commands
from perf.cases.in_process import shoal_lookup
from perf.cases.starts import added_pss, seconds_until_ready
from perf.dataset import Dataset, distinct_documents, key_lists, publish_delta, publish_snapshot, random_documents
from perf.lookups import Lookup
from perf.measure import Subject, alternate, ratio, seconds_each
from perf.report import Finding
from perf.scale import Scale
from perf.stores import ROWS_PER_FILE, bring_up_to_date, check, loaded, stored_bytes
from shoal.engine.format.paths import DATA
from shoal.engine.root.export_root import ExportRoot

FEATURES = 20
KEYS = 500
COLD_REQUESTS = 20
READ_BLOCK = 8 << 20
CHANGED_SHARE = 0.01
ROW_OVERHEAD = 48
"""The most bytes of a row in addition to its values, in the root and in the store: hashes, event time and key."""


def run(scale: Scale) -> list[Finding]:
    """Measure everything, against a store of `scale.rows` rows with the same features."""
    data = Dataset(scale.huge_rows, FEATURES)
    few = loaded(scale.directory, Dataset(scale.rows, FEATURES))
    _demand_room(scale.directory, data)
    case = f"{data.rows:,} x {FEATURES}"
    with tempfile.TemporaryDirectory(prefix="many-", dir=scale.directory) as temporary:
        root = ExportRoot(Path(temporary) / "root")
        store = Path(temporary) / "store"
        snapshot = publish_snapshot(root, data, files=max(2, data.rows // ROWS_PER_FILE))
        load = commands.run("load", "--store", store, "--from", root.path)
        for file in snapshot.files:
            # Remove the snapshot's files. The delta needs only the manifest, and the disk space is needed for other
            # files.
            (root.directory(snapshot) / file.path).unlink()
        findings = [
            Finding(case, "load", load.seconds, "s"),
            Finding(case, "load, rows a second", data.rows / load.seconds, "1/s"),
            Finding(case, "most memory of the loader", load.peak_private / 1e6, "MB"),
            Finding(case, "the same with mapped files", load.peak_rss / 1e6, "MB"),
            Finding(case, "bytes a row", stored_bytes(store, data.view) / data.rows, "B"),
            *_lookups(scale, case, {scale.rows: few, data.rows: store}),
            Finding(case, "seconds until a server is ready", seconds_until_ready(store), "s", at_most=1.5),
            Finding(case, "PSS that one more worker adds", added_pss(store, data, scale.directory), "MB", at_most=60.0),
        ]
        check(store, data)
        changed = distinct_documents(data, int(data.rows * CHANGED_SHARE), seed=7)
        publish_delta(root, data, changed, change=1)
        started = time.perf_counter()
        bring_up_to_date(store, root)
        seconds = time.perf_counter() - started
        check(store, data, changed, change=1)
    return [*findings, Finding(case, f"delta of {changed.size:,} rows", seconds, "s")]


def _demand_room(directory: Path, data: Dataset) -> None:
    needed = 2 * data.rows * (4 * data.features + ROW_OVERHEAD)
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise click.ClickException(f"{data.rows:,} rows need {needed >> 30} GiB in {directory}, {free >> 30} are free")


def _lookups(scale: Scale, case: str, stores: dict[int, Path]) -> list[Finding]:
    """Measure lookups in each store, first with nothing of the store in memory, and then with all of it in memory. The
    stores take turns."""
    findings: list[Finding] = []
    subjects: dict[str, Subject] = {}
    for rows, store in stores.items():
        data = Dataset(rows, FEATURES)
        name = f"{rows:,} rows"
        _drop_from_memory(store)
        started = time.perf_counter()
        lookup = shoal_lookup(store, data)
        opened = time.perf_counter() - started
        cold = [_each(lookup, [keys]) for keys in key_lists(random_documents(data, KEYS, COLD_REQUESTS, seed=2))]
        _read_into_memory(store)
        findings += [
            Finding(case, f"open, {name}, nothing in memory", 1e3 * opened, "ms"),
            Finding(case, f"{KEYS} keys of {name}, nothing in memory", 1e3 * statistics.median(cold), "ms"),
        ]
        subjects[name] = partial(_each, lookup, key_lists(random_documents(data, KEYS, scale.requests)))
    costs = alternate(subjects, scale.rounds)
    few, many = subjects
    return [
        *findings,
        *(Finding(case, f"{KEYS} keys of {name}", 1e6 * float(np.median(costs[name])), "us") for name in subjects),
        Finding(case, f"{KEYS} keys, {many} / {few}", ratio(costs, many, few), "x"),
    ]


def _each(lookup: Lookup, keys: Sequence[list[str]]) -> float:
    return seconds_each(lambda number: lookup(keys[number]), len(keys))


def _drop_from_memory(store: Path) -> None:
    """Drop a store's generations from the page cache. No process may have them mapped."""
    for path in (store / "generations").rglob(DATA):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read_into_memory(store: Path) -> None:
    for path in (store / "generations").rglob(DATA):
        with path.open("rb", buffering=0) as file:
            while file.read(READ_BLOCK):
                pass
