"""Lookups of other shapes: overlays over the base, and several views in one request."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from perf.dataset import (
    THE_USER,
    Dataset,
    document_keys,
    key_lists,
    matrix,
    publish_delta,
    publish_snapshot,
    random_documents,
)
from perf.measure import alternate, ratio, seconds_each
from perf.report import Finding
from perf.scale import Scale
from perf.stores import loaded
from shoal import FeatureStore
from shoal.engine.root.export_root import ExportRoot
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.follow.load import NullObserver, catch_up

FEATURES = 50
KEYS = 500
OVERLAY_SHARES = (0.15, 0.025, 0.004, 0.0007, 0.0001, 0.00002)
"""The sizes of the overlays as shares of the rows, oldest first. They are chosen so that no overlays are merged."""


def run_overlays(scale: Scale) -> list[Finding]:
    """Measure the same lookups with six overlays and with none."""
    data = Dataset(scale.rows, FEATURES)
    with_none = loaded(scale.directory, data)
    with_six = _with_overlays(scale.directory, data)
    keys = key_lists(random_documents(data, KEYS, scale.requests))
    stores = {"none": FeatureStore.open(with_none), "six": FeatureStore.open(with_six)}
    overlays = len(stores["six"].version().view(data.view).record.overlays)
    subjects = {
        name: lambda store=store: seconds_each(
            lambda number: store.lookup_matrix(data.references, {"doc_id": keys[number]}), len(keys)
        )
        for name, store in stores.items()
    }
    costs = alternate(subjects, scale.rounds)
    case = f"in process, {KEYS} x {FEATURES} of {data.rows:,}, {overlays} overlays against none"
    return [
        *(Finding(case, name, 1e6 * float(np.median(costs[name])), "us") for name in costs),
        Finding(case, "with / without", ratio(costs, "six", "none"), "x", at_most=1.5),
    ]


def _with_overlays(directory: Path, data: Dataset) -> Path:
    root = ExportRoot(directory / "overlays-root")
    store = directory / "overlays-store"
    shutil.rmtree(root.path, ignore_errors=True)
    shutil.rmtree(store, ignore_errors=True)
    publish_snapshot(root, data, files=2)
    generator = np.random.default_rng(5)
    for change, share in enumerate(OVERLAY_SHARES, 1):
        count = max(1, int(data.rows * share))
        publish_delta(root, data, generator.choice(data.rows, count, replace=False).astype(np.int64), change)
    with StoreWriter(store) as writer:
        catch_up(writer, root, data.view, NullObserver())
    return store


def run_views(scale: Scale) -> list[Finding]:
    """Compare one request for a user, documents, and pairs of the user and a document with three separate requests."""
    join_keys = {"users": ("user_id",), "docs": ("doc_id",), "pairs": ("user_id", "doc_id")}
    views = {name: Dataset(scale.rows, 20, name, keys) for name, keys in join_keys.items()}
    store = scale.directory / "views-store"
    root = ExportRoot(scale.directory / "views-root")
    if not store.exists():
        for data in views.values():
            publish_snapshot(root, data, files=2)
        with StoreWriter(store) as writer:
            for name in views:
                catch_up(writer, root, name, NullObserver())
    opened = FeatureStore.open(store)
    keys = key_lists(random_documents(views["docs"], KEYS, scale.requests))
    together = [reference for data in views.values() for reference in data.references]

    def ask(references: list[str]) -> float:
        def look_up(number: int) -> object:
            return opened.lookup_matrix(references, {"doc_id": keys[number], "user_id": THE_USER})

        return seconds_each(look_up, len(keys))

    check(store, views)
    subjects = {
        "together": lambda: ask(together),
        "apart": lambda: sum(ask(data.references) for data in views.values()),
    }
    costs = alternate(subjects, scale.rounds)
    case = f"in process, user, {KEYS} documents and {KEYS} pairs, 20 features of each"
    return [
        *(Finding(case, name, 1e6 * float(np.median(costs[name])), "us") for name in costs),
        Finding(case, "together / sum of its parts", ratio(costs, "together", "apart"), "x", at_most=1.3),
    ]


def check(store: Path, views: Mapping[str, Dataset]) -> None:
    """Check one answer from all views with the formula."""
    documents = np.array([7, 11, 13], np.int64)
    references = [reference for data in views.values() for reference in data.references]
    entities = {"doc_id": document_keys(documents), "user_id": THE_USER}
    found = FeatureStore.open(store).lookup_matrix(references, entities).matrix
    user = np.full(documents.size, 7, np.int64)
    parts = [matrix(user if data.join_keys == ("user_id",) else documents, data.features) for data in views.values()]
    if not np.array_equal(found, np.concatenate(parts, axis=1)):
        raise AssertionError("lookups in several views answer wrongly")
