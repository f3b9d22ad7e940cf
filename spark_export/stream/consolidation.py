"""A log that a stream lengthens all the time, made short: a snapshot of all it holds, and what is older removed."""

from pyspark.sql import DataFrame, Observation, SparkSession, Window
from pyspark.sql import functions as F

from engine.errors import StreamFailed
from engine.export_root import MANIFEST, ExportRoot, entry_directory, log_directory
from engine.keys import KEY_HASH, KEY_HASH_2
from engine.manifest import EVENT_TIMESTAMP, TOMBSTONE, Manifest
from spark_export.guard import Numbers
from spark_export.publication import FILE, read_parts
from spark_export.source import spark_type
from spark_export.value_counts import has_value
from spark_export.views import ViewDefinition

_SEQ = "__seq"
_RANK = "__rank"
_ROWS = "__rows"
_SEQ_OF_A_FILE = r"/(?:deltas|snapshots)/([0-9]{12})"


def entries_since_snapshot(root: ExportRoot, newest: Manifest) -> list[Manifest]:
    """A log's newest entries, the newest first, back to a snapshot."""
    entries = [newest]
    while entries[-1].kind != "snapshot":
        entries.append(root.entry(newest.view.name, entries[-1].seq - 1))
    return entries


def rows_of(view: ViewDefinition, root: ExportRoot, entries: list[Manifest], spark: SparkSession) -> DataFrame:
    """What a node serves that applied these entries, a snapshot and the deltas behind it, with a snapshot's columns."""
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
    """How many rows were written, and how many of them have a value, by feature.

    The stage that writes the rows counts them. Spark takes the counts of each of its partitions once, also if a task is
    repeated.
    """

    def __init__(self, view: ViewDefinition) -> None:
        self._columns = [F.count_if(has_value(feature)).alias(feature.name) for feature in view.features]
        self._observation = Observation()

    def of(self, rows: DataFrame) -> DataFrame:
        """The rows, which are to be written next, and only once."""
        return rows.observe(self._observation, F.count(F.lit(1)).alias(_ROWS), *self._columns)

    def numbers(self) -> Numbers:
        """The numbers, once the rows are written."""
        values = dict(self._observation.get)
        return Numbers(values.pop(_ROWS), values)


def check_complete(root: ExportRoot, entries: list[Manifest], rows: int) -> None:
    """Check that entries gave as many rows as a log must have: older entries are removed for what was made of them.

    Raises:
        StreamFailed: rows are missing. A Spark that is set to ignore missing or damaged files reads fewer.
    """
    least = entries[-1].rows - sum(entry.tombstones for entry in entries[:-1])
    if rows < least:
        raise StreamFailed(
            f"view {entries[0].view.name!r}: its log in {root} has at least {least} rows, but Spark read only {rows}; "
            f"no snapshot was published, and no entry was removed; leave out the settings "
            f"spark.sql.files.ignoreMissingFiles and spark.sql.files.ignoreCorruptFiles, and start the stream again"
        )


def remove_before(root: ExportRoot, view: str, seq: int) -> None:
    """Remove a log's entries before `seq`, and their files. A node that stands there starts over from a snapshot."""
    directories = [log_directory(view, old) for old in root.sequence_numbers(view) if old < seq]
    directories += [f"{view}/snapshots/{old}" for old in root.snapshot_ids(view) if int(old[:12]) < seq]
    # Without its manifest an entry does not exist, whatever becomes of the rest.
    root.storage.remove(f"{directory}/{MANIFEST}" for directory in directories)
    for directory in directories:
        root.storage.remove_directory(directory)
