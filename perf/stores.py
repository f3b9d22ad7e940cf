"""Stores for benchmarks, made once per run and size."""

from pathlib import Path

from engine.export_root import ExportRoot
from loaders.load import Applied, Silence, load
from loaders.store_writer import StoreWriter
from perf.dataset import Dataset, publish_snapshot

ROWS_PER_FILE = 1_250_000


def published(directory: Path, data: Dataset) -> ExportRoot:
    """An export root with a snapshot of the data, published now if it is not there yet."""
    root = ExportRoot(directory / f"root-{data.view}-{data.rows}x{data.features}")
    if not root.sequence_numbers(data.view):
        publish_snapshot(root, data, files=max(2, data.rows // ROWS_PER_FILE))
    return root


def loaded(directory: Path, data: Dataset) -> Path:
    """A store with the data, loaded now if it is not there yet."""
    store = directory / f"store-{data.view}-{data.rows}x{data.features}"
    if not store.exists():
        bring_up_to_date(store, published(directory, data))
    return store


def bring_up_to_date(store: Path, root: ExportRoot) -> list[Applied]:
    """What `shoal load` does, in this process."""
    with StoreWriter(store) as writer:
        return load(writer, root, Silence())
