"""Stores for benchmarks: made once per run and size, copied to be written to, and held against the formula."""

import os
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engine import FeatureStore
from engine.environment import generations_path, live_path
from engine.export_root import ExportRoot
from loaders.load import Applied, Silence, load
from loaders.store_writer import StoreWriter
from perf.dataset import Dataset, document_keys, matrix, publish_snapshot, random_documents

ROWS_PER_FILE = 1_250_000


def published(directory: Path, data: Dataset) -> ExportRoot:
    """An export root with a snapshot of the data, published now if it is not there yet; not to be added to."""
    root = ExportRoot(directory / f"root-{data.view}-{data.rows}x{data.features}")
    if not root.sequence_numbers(data.view):
        publish_snapshot(root, data, files=max(2, data.rows // ROWS_PER_FILE))
    return root


def loaded(directory: Path, data: Dataset) -> Path:
    """A store with the data, loaded now if it is not there yet; not to be written to."""
    store = store_path(directory, data)
    if not store.exists():
        bring_up_to_date(store, published(directory, data))
    return store


def store_path(directory: Path, data: Dataset) -> Path:
    """Where `loaded` keeps a store with the data."""
    return directory / f"store-{data.view}-{data.rows}x{data.features}"


def bring_up_to_date(store: Path, root: ExportRoot) -> list[Applied]:
    """What `shoal load` does, in this process."""
    with StoreWriter(store) as writer:
        return load(writer, root, Silence())


def copy_of_root(root: ExportRoot, path: Path) -> ExportRoot:
    """A root that may be added to. Published files are never written again, so they are linked: it takes no room."""
    shutil.copytree(root.path, path, copy_function=os.link)
    return ExportRoot(path)


def copy_of_store(store: Path, path: Path) -> Path:
    """A store that may be written to. Its generations are never written again, so they are linked."""
    shutil.copytree(store / "generations", path / "generations", copy_function=os.link)
    shutil.copytree(live_path(store), live_path(path), ignore=shutil.ignore_patterns("lock.mdb"))
    return path


def stored_bytes(store: Path, view: str) -> int:
    """The bytes of a view's base generations on disk."""
    return sum(path.stat().st_size for path in generations_path(store, view).rglob("data.mdb"))


def check(store: Path, data: Dataset, documents: npt.NDArray[np.int64] | None = None, change: int = 0) -> None:
    """Hold what a store answers against the formula: for a thousand of these documents, or of any.

    Raises:
        AssertionError: a value is wrong.
    """
    asked = (random_documents(data, 1000, 1)[0] if documents is None else documents)[:1000]
    found = FeatureStore.open(store).lookup_matrix(data.references, {"doc_id": document_keys(asked)}).matrix
    if not np.array_equal(found, matrix(asked, data.features, change)):
        raise AssertionError(f"{store} answers wrongly")
