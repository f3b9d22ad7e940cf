"""Decide whether a series of samples grows, with rules that are robust against a few outliers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_SHARE = 0.05
_SURE = 2.58
"""A number of standard deviations. By chance alone, a value exceeds this number once in two hundred times."""


@dataclass(frozen=True)
class Trend:
    """The trend of a series: its median, and its rise over its whole length. The rise is that of the Theil-Sen line.
    The slope of this line is the median of the slopes between all pairs of samples. `is_sure` is true if Kendall's test
    excludes chance as the cause of the rise."""

    median: float
    rise: float
    is_sure: bool

    def grows(self, at_most: float) -> bool:
        """Return whether the series grows: it rises by more than `at_most` and by more than 5% of its median, and the
        rise is not due to chance."""
        return self.rise > self.allowed(at_most) and self.is_sure

    def allowed(self, at_most: float) -> float:
        """Return the rise up to which the series does not count as growing."""
        return max(at_most, _SHARE * self.median)


def trend(times: Sequence[float], samples: Sequence[float]) -> Trend:
    """Return the trend of samples. `times` are the times of the samples in seconds."""
    x = np.array(times)
    y = np.array(samples)
    if y.size < 2:
        return Trend(float(np.median(y)) if y.size else math.nan, 0.0, is_sure=False)
    one, other = np.triu_indices(y.size, 1)
    slopes = (y[other] - y[one]) / (x[other] - x[one])
    # Kendall's S, and the variance that S has for samples in random order, corrected for ties.
    score = float(np.sign(slopes).sum())
    ties = np.unique(y, return_counts=True)[1]
    n = y.size
    variance = (n * (n - 1) * (2 * n + 5) - (ties * (ties - 1) * (2 * ties + 5)).sum()) / 18
    is_sure = variance > 0 and score / math.sqrt(variance) > _SURE
    return Trend(float(np.median(y)), float(np.median(slopes)) * float(x[-1] - x[0]), is_sure)
