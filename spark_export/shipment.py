"""The rows of an entry, as Spark writes them: those that the ledger says to ship, in files by range of the key hash."""

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from engine.keys import KEY_HASH, KEY_HASH_2
from engine.manifest import EVENT_TIMESTAMP, TOMBSTONE
from spark_export.checks import checks, flaw
from spark_export.hashes import hash_range
from spark_export.ledger import KEY, ROW_HASH, SHIPPED, VERDICT, Tally, Verdict, newest_first
from spark_export.views import ViewDefinition

_BROADCAST_KEYS = 1_000_000
"""Up to so many changed keys go to every executor, about 100 MB, which spares a shuffle of the whole source."""

_RANGE = "__range"
_RANK = "__rank"


def snapshot_rows(view: ViewDefinition, rows: DataFrame, run_time: int) -> DataFrame:
    """All of a source's rows (see `spark_export.ledger.with_hashes`), with the columns of a snapshot."""
    return rows.select(_sound(view, run_time), KEY_HASH_2, ROW_HASH, EVENT_TIMESTAMP, *_named_columns(view))


def delta_rows(view: ViewDefinition, rows: DataFrame, ledger: DataFrame, found: Tally, run_time: int) -> DataFrame:
    """The rows that the ledger says to ship, and a tombstone for each key that it says was removed."""
    keys = ledger.where(F.col(VERDICT).isin(*SHIPPED)).select(*KEY)
    if found.shipped <= _BROADCAST_KEYS:
        keys = F.broadcast(keys)
    living = rows.join(keys, KEY, "left_semi").withColumn(TOMBSTONE, F.lit(False))
    living = living.select(
        _sound(view, run_time), KEY_HASH_2, ROW_HASH, EVENT_TIMESTAMP, TOMBSTONE, *_named_columns(view)
    )
    nothing = [F.lit(None).cast(living.schema[name].dataType).alias(name) for name in _named_columns(view)]
    removed = ledger.where(F.col(VERDICT) == Verdict.REMOVED)
    tombstones = removed.select(*KEY, ROW_HASH, EVENT_TIMESTAMP, F.lit(True).alias(TOMBSTONE), *nothing)
    if not found.shipped:
        # Spares the source a second reading.
        return tombstones
    return living.union(tombstones) if found.counts[Verdict.REMOVED] else living


def in_files(view: ViewDefinition, rows: DataFrame, *, duplicates: bool) -> DataFrame:
    """Rows as they are written: a partition, which makes a file, for each hash range, sorted by key hash.

    With `duplicates`, only the newest row of each key stays.
    """
    columns = [name for name in rows.columns if name != ROW_HASH]
    ranged = rows.withColumn(_RANGE, hash_range(F.col(KEY_HASH), view.shards)).repartitionById(view.shards, _RANGE)
    if duplicates:
        # The rows of a range are together already, so ranking within it moves none of them.
        ranged = ranged.withColumn(_RANK, newest_first(view, _RANGE, *KEY)).where(F.col(_RANK) == 1)
    return ranged.sortWithinPartitions(_RANGE, *KEY).select(columns)


def _sound(view: ViewDefinition, run_time: int) -> Column:
    """The first hash of a row that can be published. The source was checked before, but is read a second time here."""
    wrong = F.raise_error(F.lit("the source changed while it was read, and a row cannot be published; export again"))
    return F.when(flaw(checks(view, run_time)).isNull(), F.col(KEY_HASH)).otherwise(wrong).alias(KEY_HASH)


def _named_columns(view: ViewDefinition) -> list[str]:
    return [key.name for key in view.join_keys] + [feature.name for feature in view.features]
