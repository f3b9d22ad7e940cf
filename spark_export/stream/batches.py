"""A micro-batch as one Arrow table: checked, hashed, the newest row of each key, in the order of the hashes.

Spark runs one job for it. The table depends on the batch's rows alone, not on how they were spread over tasks: what is
read again after a crash makes the same table.
"""

from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame

from engine.errors import SourceError
from engine.keys import KEY_HASH, KEY_HASH_2
from engine.manifest import EVENT_TIMESTAMP
from engine.times import shown_time, to_micros
from spark_export.checks import Check, broken_demand, broken_row, checks, flaw, found
from spark_export.guard import Numbers
from spark_export.hashes import key_hashes, row_hash
from spark_export.spark_errors import source_errors
from spark_export.views import ViewDefinition

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
    """The newest row of each key of a batch, whose rows are as `spark_export.source.fit` gives them.

    The columns are `__key_hash`, `__key_hash_2`, `__event_timestamp`, join keys and features; all is held in memory.

    Raises:
        SourceError: a row cannot be published.
    """
    demands = checks(view, to_micros(datetime.now(UTC)))
    first, second = key_hashes(view.join_keys)
    hashes = {KEY_HASH: first, KEY_HASH_2: second, _ROW_HASH: row_hash(view.features)}
    with source_errors():
        table = rows.withColumns(hashes | {_FLAW: flaw(demands), _FOUND: found(demands)}).toArrow()
    if table[_FLAW].null_count < table.num_rows:
        raise _unsound(view, table, demands)
    order = pc.sort_indices(table.select([name for name, _ in _ORDER]), sort_keys=list(_ORDER)).to_numpy()
    identity = np.stack([table[name].to_numpy()[order] for name in (KEY_HASH, KEY_HASH_2)])
    is_newest = np.ones(order.size, np.bool_)
    is_newest[1:] = np.any(identity[:, 1:] != identity[:, :-1], axis=0)
    named = [*(key.name for key in view.join_keys), *(feature.name for feature in view.features)]
    return table.select([KEY_HASH, KEY_HASH_2, EVENT_TIMESTAMP, *named]).take(order[is_newest]).combine_chunks()


def numbers_of(view: ViewDefinition, table: pa.Table) -> Numbers:
    """Count the rows of such a table, and those with a value, by feature; a table without columns has no rows."""
    values = dict.fromkeys((feature.name for feature in view.features), 0)
    if table.num_rows:
        values = {name: table.num_rows - pc.sum(pc.is_null(table[name], nan_is_null=True)).as_py() for name in values}
    return Numbers(table.num_rows, values)


def _unsound(view: ViewDefinition, table: pa.Table, demands: list[Check]) -> SourceError:
    flawed = table.filter(pc.is_valid(table[_FLAW])).sort_by(_FLAW)
    broken = flawed[_FLAW][0].as_py()
    count = pc.sum(pc.equal(flawed[_FLAW], broken)).as_py()
    # A time outside the years that Python has cannot be shown by Arrow.
    time = flawed[EVENT_TIMESTAMP].cast(pa.int64())[0].as_py()
    identity = [None if time is None else shown_time(time), *(flawed[key.name][0] for key in view.join_keys)]
    example = broken_row(view, flawed[_FOUND][0], identity)
    return SourceError(
        f"view {view.name!r}: {broken_demand(demands[broken], count)}{example}; nothing of this batch was "
        f"published; leave such events out by the stream's sql, and start it again"
    )
