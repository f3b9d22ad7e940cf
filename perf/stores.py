"""Stores for benchmarks: create them once per run and size, copy them for writing, and compare their answers with the
formula of `perf.dataset`."""

import os
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt

from perf.dataset import Dataset, document_keys, matrix, publish_snapshot, random_documents
from shoal import FeatureStore
from shoal.engine.format.paths import generations_path, live_path
from shoal.engine.root.export_root import ExportRoot
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.follow.load import AppliedEntry, NullObserver, load

ROWS_PER_FILE = 1_250_000


def published(directory: Path, data: Dataset) -> ExportRoot:
    """Return an export root with a snapshot of the data. Publish the snapshot first if it is missing. Callers must not
    publish to this root."""
    root = ExportRoot(directory / f"root-{data.view}-{data.rows}x{data.features}")
    if not root.sequence_numbers(data.view):
        publish_snapshot(root, data, files=max(2, data.rows // ROWS_PER_FILE))
    return root


def loaded(directory: Path, data: Dataset) -> Path:
    """Return a store with the data. Load the store first if it is missing. Callers must not write to this store."""
    store = store_path(directory, data)
    if not store.exists():
        bring_up_to_date(store, published(directory, data))
    return store


def store_path(directory: Path, data: Dataset) -> Path:
    """Return the path of the store that `loaded` creates for the data."""
    return directory / f"store-{data.view}-{data.rows}x{data.features}"


def bring_up_to_date(store: Path, root: ExportRoot) -> list[AppliedEntry]:
    """Load new entries into a store like `shoal load`, but in this process."""
    with StoreWriter(store) as writer:
        return load(writer, root, NullObserver())


def copy_of_root(root: ExportRoot, path: Path) -> ExportRoot:
    """Return a copy of a root. Callers may publish to the copy. The copy takes no disk space: it has hard links to the
    published files, because these never change."""
    shutil.copytree(root.path, path, copy_function=os.link)
    return ExportRoot(path)


def copy_of_store(store: Path, path: Path) -> Path:
    """Return a copy of a store. Callers may write to the copy. It has hard links to the generations, because these
    never change."""
    shutil.copytree(store / "generations", path / "generations", copy_function=os.link)
    shutil.copytree(live_path(store), live_path(path), ignore=shutil.ignore_patterns("lock.mdb"))
    return path


def stored_bytes(store: Path, view: str) -> int:
    """Return the size of a view's base generations on disk in bytes."""
    return sum(path.stat().st_size for path in generations_path(store, view).rglob("data.mdb"))


def check(store: Path, data: Dataset, documents: npt.NDArray[np.int64] | None = None, change: int = 0) -> None:
    """Compare a store's answers with the formula of `perf.dataset`, for up to a thousand of the given documents. If no
    documents are given, compare the answers for a thousand random documents.

    Raises:
        AssertionError: a value is wrong.
    """
    asked = (random_documents(data, 1000, 1)[0] if documents is None else documents)[:1000]
    found = FeatureStore.open(store).lookup_matrix(data.references, {"doc_id": document_keys(asked)}).matrix
    if not np.array_equal(found, matrix(asked, data.features, change)):
        raise AssertionError(f"{store} answers wrongly")
