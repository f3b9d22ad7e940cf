"""Whether a series of samples grows, by rules that a few odd samples do not change."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_SHARE = 0.05
_SURE = 2.58
"""Standard deviations: chance alone goes beyond that once in two hundred."""


@dataclass(frozen=True)
class Trend:
    """Of a series: its median, and by how much it rises over its length along the Theil-Sen line, the median of the
    slopes between all pairs of samples."""

    median: float
    rise: float
    is_sure: bool

    def grows(self, at_most: float) -> bool:
        """Whether it rises by more than `at_most` and by more than 5% of its median, which Kendall's test says is not
        by chance."""
        return self.rise > self.allowed(at_most) and self.is_sure

    def allowed(self, at_most: float) -> float:
        """What it may rise by without being said to grow."""
        return max(at_most, _SHARE * self.median)


def trend(times: Sequence[float], samples: Sequence[float]) -> Trend:
    """The trend of samples at some moments, in seconds."""
    x, y = np.array(times), np.array(samples)
    if y.size < 2:
        return Trend(float(np.median(y)) if y.size else math.nan, 0.0, is_sure=False)
    one, other = np.triu_indices(y.size, 1)
    slopes = (y[other] - y[one]) / (x[other] - x[one])
    # Kendall's S, and its deviation if the order of the samples were one of chance, ties considered.
    score = float(np.sign(slopes).sum())
    ties = np.unique(y, return_counts=True)[1]
    n = y.size
    variance = (n * (n - 1) * (2 * n + 5) - (ties * (ties - 1) * (2 * ties + 5)).sum()) / 18
    is_sure = variance > 0 and score / math.sqrt(variance) > _SURE
    return Trend(float(np.median(y)), float(np.median(slopes)) * float(x[-1] - x[0]), is_sure)
