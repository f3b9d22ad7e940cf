"""Count the rows with a value for each feature, without another pass over the source.

Each row of a ledger has one bit per feature, packed into columns of 63 bits (bigint: `__values_0`, `__values_1`, …).
The ledger stores the bits next to the row's hashes and its verdict (see `ledger.Verdict`). The counts are read from the
ledger, so a row counts once even if Spark repeats a task, and a later run knows which values a removed row had.
"""

from functools import reduce

from pyspark.sql import Column
from pyspark.sql import functions as F

from shoal.engine.format.schema import Feature
from shoal.spark_export.views.definition import ViewDefinition

_BITS = 63
"""The number of bits in a word. The sign bit of a bigint is not used."""


def word_names(view: ViewDefinition) -> list[str]:
    """Return the names of the columns with the bits."""
    return [f"__values_{number}" for number in range(-(-len(view.features) // _BITS))]


def words(view: ViewDefinition) -> list[Column]:
    """Return the bigint columns with the bits, computed from a row's features."""
    return [
        reduce(Column.bitwiseOR, (_bit(feature, place) for place, feature in enumerate(view.features[first:][:_BITS])))
        .cast("bigint")
        .alias(name)
        for name, first in zip(word_names(view), range(0, len(view.features), _BITS), strict=True)
    ]


def sums(view: ViewDefinition) -> list[Column]:
    """Return one bigint column per feature: the number of rows in a group that have a value of the feature; null if no
    row has bits."""
    return [
        F.sum(F.getbit(f"__values_{position // _BITS}", F.lit(position % _BITS)).cast("bigint"))
        for position in range(len(view.features))
    ]


def has_value(feature: Feature) -> Column:
    """Return a boolean column: whether a row has a value of a feature. NaN counts as null, as in Feast."""
    column = F.col(feature.name)
    if feature.type in ("float32", "float64"):
        return column.isNotNull() & ~F.isnan(column)
    return column.isNotNull()


def _bit(feature: Feature, place: int) -> Column:
    return F.when(has_value(feature), F.lit(1 << place).cast("bigint")).otherwise(F.lit(0).cast("bigint"))
