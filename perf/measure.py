"""Time things side by side: every subject a round, round after round, and the median over rounds.

On a noisy machine only what was measured in the same minutes can be compared; ratios are therefore made round by round.
"""

import time
from collections.abc import Callable, Mapping
from statistics import median

Subject = Callable[[], float]
"""Does a fixed amount of work and returns what it cost per unit, such as seconds per request."""


def alternate(subjects: Mapping[str, Subject], rounds: int) -> dict[str, list[float]]:
    """Run every subject once a round; the first round warms up and does not count."""
    costs: dict[str, list[float]] = {name: [] for name in subjects}
    for number in range(rounds + 1):
        for name, subject in subjects.items():
            cost = subject()
            if number:
                costs[name].append(cost)
    return costs


def ratio(costs: Mapping[str, list[float]], one: str, other: str) -> float:
    """The median over rounds of one subject's cost over another's."""
    return median(a / b for a, b in zip(costs[one], costs[other], strict=True))


def seconds_each(work: Callable[[int], object], count: int) -> float:
    """The mean wall time of work(0) … work(count - 1), in seconds."""
    started = time.perf_counter()
    for number in range(count):
        work(number)
    return (time.perf_counter() - started) / count
