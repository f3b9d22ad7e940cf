"""The rows of an entry: select the rows that the ledger marks for shipping, and split them into files by key hash."""

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from shoal.engine.format.keys import KEY_HASH, KEY_HASH_2
from shoal.engine.root.manifest import EVENT_TIMESTAMP, TOMBSTONE
from shoal.spark_export.changes.hashes import hash_range
from shoal.spark_export.changes.ledger import (
    KEY,
    ROW_HASH,
    SHIPPED,
    VERDICT,
    Tally,
    Verdict,
    newest_first,
)
from shoal.spark_export.source.checks import checks, first_problem
from shoal.spark_export.views.definition import ViewDefinition

_BROADCAST_KEYS = 1_000_000
"""The greatest number of changed keys that are sent to every executor. They take about 100 MB, and sending them avoids
a shuffle of the whole source."""

_RANGE = "__range"
_RANK = "__rank"


def snapshot_rows(view: ViewDefinition, rows: DataFrame, run_time: int) -> DataFrame:
    """Return all rows of a source with the columns of a snapshot.

    `rows` is as returned by `shoal.spark_export.changes.ledger.with_hashes`.
    """
    return rows.select(_sound(view, run_time), KEY_HASH_2, ROW_HASH, EVENT_TIMESTAMP, *_named_columns(view))


def delta_rows(view: ViewDefinition, rows: DataFrame, ledger: DataFrame, found: Tally, run_time: int) -> DataFrame:
    """Return the rows that the ledger marks for shipping, and a tombstone for each key marked as removed."""
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
        # This avoids reading the source a second time.
        return tombstones
    return living.union(tombstones) if found.counts[Verdict.REMOVED] else living


def in_files(view: ViewDefinition, rows: DataFrame, *, duplicates: bool) -> DataFrame:
    """Return rows in one partition per hash range, sorted by key hash. Each partition becomes one file.

    With `duplicates`, keep only the newest row of each key.
    """
    columns = [name for name in rows.columns if name != ROW_HASH]
    ranged = rows.withColumn(_RANGE, hash_range(F.col(KEY_HASH), view.shards)).repartitionById(view.shards, _RANGE)
    if duplicates:
        # The rows of a hash range are in one partition already, so ranking within the range needs no further shuffle.
        ranged = ranged.withColumn(_RANK, newest_first(view, _RANGE, *KEY)).where(F.col(_RANK) == 1)
    return ranged.sortWithinPartitions(_RANGE, *KEY).select(columns)


def _sound(view: ViewDefinition, run_time: int) -> Column:
    """Return a column with the first hash of a row's key. The Spark job fails if the row cannot be published. The rows
    were checked before, but the source is read a second time here."""
    wrong = F.raise_error(F.lit("the source changed during the export, and a row is now invalid; run the export again"))
    return F.when(first_problem(checks(view, run_time)).isNull(), F.col(KEY_HASH)).otherwise(wrong).alias(KEY_HASH)


def _named_columns(view: ViewDefinition) -> list[str]:
    return [key.name for key in view.join_keys] + [feature.name for feature in view.features]
