"""Collect a micro-batch as one Arrow table: check and hash its rows, keep the newest row of each key, sort by hash.

Spark runs one job for this. The table depends only on the batch's rows, not on their distribution over tasks: a batch
that is read again after a crash gives the same table.
"""

from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame

from shoal.engine.base.errors import SourceError
from shoal.engine.base.times import shown_time, to_micros
from shoal.engine.format.keys import KEY_HASH, KEY_HASH_2
from shoal.engine.root.manifest import EVENT_TIMESTAMP
from shoal.spark_export.changes.guard import Numbers
from shoal.spark_export.changes.hashes import key_hash_columns, row_hash
from shoal.spark_export.source.checks import Check, broken_demand, broken_row, checks, first_problem, found
from shoal.spark_export.source.spark_errors import source_errors
from shoal.spark_export.views.definition import ViewDefinition

_ROW_HASH = "__row_hash"
_FLAW = "__flaw"
_FOUND = "__found"

_ORDER = (
    (KEY_HASH, "ascending"),
    (KEY_HASH_2, "ascending"),
    (EVENT_TIMESTAMP, "descending"),
    (_ROW_HASH, "descending"),
)


def collect(view: ViewDefinition, rows: DataFrame) -> pa.Table:
    """Return the newest row of each key of a batch, sorted by key hash. The table is held in memory.

    `rows` is as returned by `shoal.spark_export.source.rows.conform`. The columns of the table are `__key_hash`,
    `__key_hash_2`, `__event_timestamp`, join keys and features.

    Raises:
        SourceError: a row cannot be published.
    """
    demands = checks(view, to_micros(datetime.now(UTC)))
    first, second = key_hash_columns(view.join_keys)
    hashes = {KEY_HASH: first, KEY_HASH_2: second, _ROW_HASH: row_hash(view.features)}
    with source_errors():
        table = rows.withColumns(hashes | {_FLAW: first_problem(demands), _FOUND: found(demands)}).toArrow()
    if table[_FLAW].null_count < table.num_rows:
        raise _unsound(view, table, demands)
    order = pc.sort_indices(table.select([name for name, _ in _ORDER]), sort_keys=list(_ORDER)).to_numpy()
    identity = np.stack([table[name].to_numpy()[order] for name in (KEY_HASH, KEY_HASH_2)])
    is_newest = np.ones(order.size, np.bool_)
    is_newest[1:] = np.any(identity[:, 1:] != identity[:, :-1], axis=0)
    named = [*(key.name for key in view.join_keys), *(feature.name for feature in view.features)]
    return table.select([KEY_HASH, KEY_HASH_2, EVENT_TIMESTAMP, *named]).take(order[is_newest]).combine_chunks()


def numbers_of(view: ViewDefinition, table: pa.Table) -> Numbers:
    """Count the rows of a table from `collect`, and the rows with a value for each feature. A table without columns has
    no rows."""
    values = dict.fromkeys((feature.name for feature in view.features), 0)
    if table.num_rows:
        values = {name: table.num_rows - pc.sum(pc.is_null(table[name], nan_is_null=True)).as_py() for name in values}
    return Numbers(table.num_rows, values)


def _unsound(view: ViewDefinition, table: pa.Table, demands: list[Check]) -> SourceError:
    flawed = table.filter(pc.is_valid(table[_FLAW])).sort_by(_FLAW)
    broken = flawed[_FLAW][0].as_py()
    count = pc.sum(pc.equal(flawed[_FLAW], broken)).as_py()
    # Arrow cannot convert a time outside the years 1 to 9999 to a Python datetime, so the time is read as an integer.
    time = flawed[EVENT_TIMESTAMP].cast(pa.int64())[0].as_py()
    identity = [None if time is None else shown_time(time), *(flawed[key.name][0] for key in view.join_keys)]
    example = broken_row(view, flawed[_FOUND][0], identity)
    return SourceError(
        f"view {view.name!r}: {broken_demand(demands[broken], count)}{example}; nothing of this batch was "
        f"published; exclude such events with the stream's sql, and start the stream again"
    )
