"""Time several subjects side by side: run every subject once per round, and take the median over the rounds.

On a noisy machine, only measurements that were made in the same minutes are comparable. So ratios are computed round by
round.
"""

import time
from collections.abc import Callable, Mapping
from statistics import median

Subject = Callable[[], float]
"""A function that does a fixed amount of work and returns its cost per unit, such as seconds per request."""


def alternate(subjects: Mapping[str, Subject], rounds: int) -> dict[str, list[float]]:
    """Run every subject once per round, and return the costs by subject. The first round warms up and does not
    count."""
    costs: dict[str, list[float]] = {name: [] for name in subjects}
    for number in range(rounds + 1):
        for name, subject in subjects.items():
            cost = subject()
            if number:
                costs[name].append(cost)
    return costs


def ratio(costs: Mapping[str, list[float]], one: str, other: str) -> float:
    """Compute for each round the cost of `one` divided by the cost of `other`. Return the median of these ratios."""
    return median(a / b for a, b in zip(costs[one], costs[other], strict=True))


def seconds_each(work: Callable[[int], object], count: int) -> float:
    """Return the mean wall time of work(0) … work(count - 1) in seconds."""
    started = time.perf_counter()
    for number in range(count):
        work(number)
    return (time.perf_counter() - started) / count
