"""The staging of a run, and the states of earlier runs.

Exporters may race. Each exporter writes under its own names, and the manifest in the log decides which one wins. An
exporter that lost or failed removes its own files.
"""

import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession

from shoal.engine.base.errors import ManifestInvalid, NotPublished, RootNotWritable, RootUnreadable
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.root.manifest import Manifest, PublishedFile
from shoal.engine.root.storage import Storage

FILE = "__file"

ABANDONED_AFTER = 24 * 3600
"""A run is assumed to be dead if its files have not changed for this time, in seconds."""


class Staging(Protocol):
    """The staging of one run of one view. `run` is the id of the entry that the run may publish. `state` is the name of
    the run's state."""

    run: str
    state: str

    def write_ledger(self, ledger: DataFrame) -> None:
        """Write this run's ledger, which becomes the state if the run publishes."""

    def read_ledger(self, spark: SparkSession, columns: str) -> DataFrame:
        """Return the ledger of this run; `columns` is its schema as DDL."""

    def write_parts(self, kind: str, rows: DataFrame) -> tuple[PublishedFile, ...]:
        """Write one durable file per partition with rows. Return their descriptions, ordered by key hash."""

    def write_table(self, kind: str, table: pa.Table) -> tuple[PublishedFile, ...]:
        """Write the rows of a table, which must be sorted by key hash, like `write_parts`."""

    def publish(self, manifest: Manifest) -> None:
        """Put the parts into the places that `manifest` names, and publish the manifest. If the manifest names a state,
        put the ledger into place as well.

        Raises:
            PublicationLost: the log already has an entry with the same seq.
            RootNotWritable: the root cannot be written.
        """


@contextmanager
def write_errors_named(root: ExportRoot) -> Iterator[None]:
    """Raise errors of the root's storage as RootNotWritable."""
    try:
        yield
    except (OSError, RootUnreadable) as error:
        raise RootNotWritable(
            f"export root {root} cannot be written: {error}; check its permissions and the space on its disk"
        ) from error


def job_name(spark: SparkSession) -> str:
    """Return the name of the publisher for a manifest: Spark application, user and host."""
    return f"{spark.sparkContext.applicationId} {spark.sparkContext.sparkUser()}@{socket.gethostname()}"


def state_directory(manifest: Manifest) -> str | None:
    """Return the directory of an entry's ledger, with which the next run compares; None if the entry has no ledger."""
    return f"{manifest.view.name}/state/{manifest.state}" if manifest.state else None


def state_directories(root: ExportRoot, view: str) -> list[str]:
    """Return the directories of all ledgers of a view."""
    return sorted(f"{view}/state/{name}" for name in root.storage.directories(f"{view}/state"))


def ledger_parts(storage: Storage, directory: str) -> list[str]:
    """Return the names of a ledger's Parquet files; an empty list if the ledger does not exist."""
    return sorted(file.name for file in storage.files(directory) if is_part(file.name))


def is_part(name: str) -> bool:
    """Return whether a file is a part with rows. Spark also writes other files, for its own use."""
    last = name.rpartition("/")[2]
    return last.startswith("part-") and last.endswith(".parquet")


def remove_states(root: ExportRoot, states: Iterable[str]) -> None:
    """Remove ledgers that no later run needs. Ignore errors, because a later run tries again."""
    with suppress(OSError, RootNotWritable, RootUnreadable):
        for state in states:
            root.storage.remove_directory(state)


def is_published(root: ExportRoot, manifest: Manifest) -> bool:
    """Return whether the log contains this entry at its seq."""
    with suppress(NotPublished, ManifestInvalid):
        return root.entry(manifest.view.name, manifest.seq).id == manifest.id
    return False
