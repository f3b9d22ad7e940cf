"""Where a run writes before it publishes, and the states that runs start from.

Exporters may race. Each writes under names of its own, and the log's manifest decides between them; one that lost, or
failed, takes away what it had written.
"""

import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Protocol

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession

from engine.errors import ManifestInvalid, NotPublished, RootNotWritable, RootUnreadable
from engine.export_root import ExportRoot
from engine.manifest import Manifest, PublishedFile
from engine.storage import Storage

FILE = "__file"

ABANDONED_AFTER = 24 * 3600
"""How many seconds after its last sign of life a run's files are taken for those of one that died."""


class Staging(Protocol):
    """Where one run of one view writes: `run` is the id of the entry that it may become, `state` its state's name."""

    run: str
    state: str

    def write_ledger(self, ledger: DataFrame) -> None:
        """Write this run's ledger, which becomes the state if the run publishes."""

    def read_ledger(self, spark: SparkSession, columns: str) -> DataFrame:
        """The ledger that was written; `columns` is its schema as DDL."""

    def write_parts(self, kind: str, rows: DataFrame) -> tuple[PublishedFile, ...]:
        """Write rows, a file each partition that has any, durably; describes them, ordered by key hash."""

    def write_table(self, kind: str, table: pa.Table) -> tuple[PublishedFile, ...]:
        """Write rows that this process has, in the order of their key hashes; as `write_parts` otherwise."""

    def publish(self, manifest: Manifest) -> None:
        """Put the parts, and the ledger if it names a state, where `manifest` says they are, and publish it.

        Raises:
            PublicationLost: the log has an entry of that seq already.
            RootNotWritable: the root refuses it.
        """


def staging(root: ExportRoot, view: str, run: str, seq: int) -> AbstractContextManager[Staging]:
    """Where a run writes that goes for `seq`, while it lasts. What runs left that ended long ago goes, too.

    Raises:
        RootNotWritable: the root refuses it.
    """
    if root.is_directory:
        from spark_export.directory_publication import directory_staging

        return directory_staging(root, view, run, seq)
    from spark_export.s3_publication import s3_staging

    return s3_staging(root, view, run, seq)


def read_state(root: ExportRoot, spark: SparkSession, state: str, columns: str) -> DataFrame:
    """An earlier run's ledger, by its directory; `columns` is its schema as DDL."""
    if root.is_directory:
        from spark_export.directory_publication import read_directory

        return read_directory(spark, root.path / state, columns)
    from spark_export.s3_publication import read_prefix

    return read_prefix(root, spark, state, columns)


def read_parts(root: ExportRoot, spark: SparkSession, names: Sequence[str], columns: str) -> DataFrame:
    """The rows of files of the root, by their names in it. `columns` is their schema as DDL, in which what a file lacks
    is null; a column `FILE` besides says, by its end, which file a row is of."""
    if root.is_directory:
        from spark_export.directory_publication import read_files

        return read_files(spark, [root.path / name for name in names], columns)
    from spark_export.s3_publication import read_objects

    return read_objects(root, spark, names, columns)


@contextmanager
def writing(root: ExportRoot) -> Iterator[None]:
    """Raise what the root's place refuses as RootNotWritable."""
    try:
        yield
    except (OSError, RootUnreadable) as error:
        raise RootNotWritable(
            f"export root {root} cannot be written: {error}; check its permissions and the space on its disk"
        ) from error


def job_name(spark: SparkSession) -> str:
    """What a manifest says of who published it."""
    return f"{spark.sparkContext.applicationId} {spark.sparkContext.sparkUser()}@{socket.gethostname()}"


def state_directory(manifest: Manifest) -> str | None:
    """Where the ledger lies that the run after this entry starts from; None if the entry names none."""
    return f"{manifest.view.name}/state/{manifest.state}" if manifest.state else None


def state_directories(root: ExportRoot, view: str) -> list[str]:
    """All ledgers that lie in a view's `state` directory."""
    return sorted(f"{view}/state/{name}" for name in root.storage.directories(f"{view}/state"))


def ledger_parts(storage: Storage, directory: str) -> list[str]:
    """The Parquet files of a ledger; none if it is not there."""
    return sorted(file.name for file in storage.files(directory) if is_part(file.name))


def is_part(name: str) -> bool:
    """Whether a file holds rows; others are Spark's own."""
    last = name.rpartition("/")[2]
    return last.startswith("part-") and last.endswith(".parquet")


def remove_states(root: ExportRoot, states: Iterable[str]) -> None:
    """Remove ledgers that no run will start from any more. What cannot be removed now is a later run's to remove."""
    with suppress(OSError, RootNotWritable, RootUnreadable):
        for state in states:
            root.storage.remove_directory(state)


def is_published(root: ExportRoot, manifest: Manifest) -> bool:
    """Whether the log's entry of this seq is this one."""
    with suppress(NotPublished, ManifestInvalid):
        return root.entry(manifest.view.name, manifest.seq).id == manifest.id
    return False
