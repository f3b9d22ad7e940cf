"""Shorten the log of a stream, which grows all the time: publish a snapshot of its rows, and remove older entries."""

from pyspark.sql import DataFrame, Observation, SparkSession, Window
from pyspark.sql import functions as F

from shoal.engine.base.errors import StreamFailed
from shoal.engine.format.keys import KEY_HASH, KEY_HASH_2
from shoal.engine.root.export_root import MANIFEST, ExportRoot, entry_directory, log_directory
from shoal.engine.root.manifest import EVENT_TIMESTAMP, TOMBSTONE, Manifest
from shoal.spark_export.changes.guard import Numbers
from shoal.spark_export.changes.value_counts import has_value
from shoal.spark_export.publication.opening import read_parts
from shoal.spark_export.publication.staging import FILE
from shoal.spark_export.source.rows import spark_type
from shoal.spark_export.views.definition import ViewDefinition

_SEQ = "__seq"
_RANK = "__rank"
_ROWS = "__rows"
_SEQ_OF_A_FILE = r"/(?:deltas|snapshots)/([0-9]{12})"


def entries_since_snapshot(root: ExportRoot, newest: Manifest) -> list[Manifest]:
    """Return the entries of a log from the newest back to the last snapshot, newest first."""
    entries = [newest]
    while entries[-1].kind != "snapshot":
        entries.append(root.entry(newest.view.name, entries[-1].seq - 1))
    return entries


def rows_of(view: ViewDefinition, root: ExportRoot, entries: list[Manifest], spark: SparkSession) -> DataFrame:
    """Return the rows that a node serves after it applied the given entries, with the columns of a snapshot. The
    entries are a snapshot and the deltas after it."""
    named = {key.name: key.type for key in view.join_keys} | {feature.name: feature.type for feature in view.features}
    columns = {KEY_HASH: "bigint", KEY_HASH_2: "bigint", EVENT_TIMESTAMP: "timestamp", TOMBSTONE: "boolean"}
    columns |= {name: spark_type(of) for name, of in named.items()}
    ddl = ", ".join(f"`{name}` {kind}" for name, kind in columns.items())
    files = [f"{entry_directory(entry)}/{file.path}" for entry in entries for file in entry.files]
    published = read_parts(root, spark, files, ddl)
    seq = F.regexp_extract(FILE, _SEQ_OF_A_FILE, 1)
    newest_first = Window.partitionBy(KEY_HASH, KEY_HASH_2).orderBy(F.desc(EVENT_TIMESTAMP), F.desc(_SEQ))
    ranked = published.withColumn(_SEQ, seq).withColumn(_RANK, F.row_number().over(newest_first))
    is_served = (F.col(_RANK) == 1) & ~F.coalesce(TOMBSTONE, F.lit(False))
    return ranked.where(is_served).drop(FILE, _SEQ, _RANK, TOMBSTONE)


class Count:
    """A counter of the written rows, and of the rows with a value for each feature.

    The stage that writes the rows counts them. Spark uses the counts of each partition once, even if it repeats a task.
    """

    def __init__(self, view: ViewDefinition) -> None:
        self._columns = [F.count_if(has_value(feature)).alias(feature.name) for feature in view.features]
        self._observation = Observation()

    def of(self, rows: DataFrame) -> DataFrame:
        """Return the rows with the counter attached. They must be written next, and only once."""
        return rows.observe(self._observation, F.count(F.lit(1)).alias(_ROWS), *self._columns)

    def numbers(self) -> Numbers:
        """Return the counts. The rows must be written before."""
        values = dict(self._observation.get)
        return Numbers(values.pop(_ROWS), values)


def check_complete(root: ExportRoot, entries: list[Manifest], rows: int) -> None:
    """Check that Spark read at least as many rows as the entries must contain. The check protects the log's rows,
    because older entries are removed after the new snapshot is published.

    Raises:
        StreamFailed: rows are missing. Spark reads too few rows if it is set to ignore missing or damaged files.
    """
    least = entries[-1].rows - sum(entry.tombstones for entry in entries[:-1])
    if rows < least:
        raise StreamFailed(
            f"view {entries[0].view.name!r}: its log in {root} has at least {least} rows, but Spark read only {rows}; "
            f"no snapshot was published, and no entry was removed; leave out the settings "
            f"spark.sql.files.ignoreMissingFiles and spark.sql.files.ignoreCorruptFiles, and start the stream again"
        )


def remove_before(root: ExportRoot, view: str, seq: int) -> None:
    """Remove a log's entries before `seq`, and their files. A node that has not applied all these entries yet starts
    over from a snapshot."""
    directories = [log_directory(view, old) for old in root.sequence_numbers(view) if old < seq]
    directories += [f"{view}/snapshots/{old}" for old in root.snapshot_ids(view) if int(old[:12]) < seq]
    # Manifests go first: without its manifest an entry does not exist, even if removing its other files fails.
    root.storage.remove(f"{directory}/{MANIFEST}" for directory in directories)
    for directory in directories:
        root.storage.remove_directory(directory)
