"""How many rows have a value, by feature, counted without another pass over the source.

Each row of a ledger has one bit per feature, packed into columns of 63 bits (bigint: `__values_0`, `__values_1`, …).
The bits travel with the row's hashes to where its verdict is found, so that a row counts once, whichever task is
repeated, and a later run knows which values a removed row had.
"""

from functools import reduce

from pyspark.sql import Column
from pyspark.sql import functions as F

from engine.schema import Feature
from spark_export.views import ViewDefinition

_BITS = 63
"""Bits of a word; the sign of a bigint is not used."""


def word_names(view: ViewDefinition) -> list[str]:
    """The columns of bits."""
    return [f"__values_{number}" for number in range(-(-len(view.features) // _BITS))]


def words(view: ViewDefinition) -> list[Column]:
    """bigint: the columns of bits of a row that has the view's features."""
    return [
        reduce(Column.bitwiseOR, (_bit(feature, place) for place, feature in enumerate(view.features[first:][:_BITS])))
        .cast("bigint")
        .alias(name)
        for name, first in zip(word_names(view), range(0, len(view.features), _BITS), strict=True)
    ]


def sums(view: ViewDefinition) -> list[Column]:
    """bigint: how many rows of a group have a value, one column per feature; null if no row has bits."""
    return [
        F.sum(F.getbit(f"__values_{position // _BITS}", F.lit(position % _BITS)).cast("bigint"))
        for position in range(len(view.features))
    ]


def has_value(feature: Feature) -> Column:
    """boolean: whether a row has a value of a feature. NaN is no value, as Feast has it."""
    column = F.col(feature.name)
    if feature.type in ("float32", "float64"):
        return column.isNotNull() & ~F.isnan(column)
    return column.isNotNull()


def _bit(feature: Feature, place: int) -> Column:
    return F.when(has_value(feature), F.lit(1 << place).cast("bigint")).otherwise(F.lit(0).cast("bigint"))
