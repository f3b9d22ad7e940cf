"""Decide when the scrub reads each chunk, and how fast. Pure functions of times and sizes; no file is read here.

Each chunk must be verified again within a period. The chunk with the oldest verification comes first. Its start time
follows from the lowest rate that meets all deadlines. The only state is the time of each chunk's last verification, so
a restarted writer continues where the previous one stopped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

FASTEST_BYTES_PER_SECOND = 256 << 20
"""The read rate after an unclean shutdown, and while the scrub is late. Even then, the scrub pauses half of the
time."""
SLOWEST_BYTES_PER_SECOND = 8 << 20
"""The lowest read rate inside a chunk. A restart discards a half-read chunk, so the chunk should take only seconds."""
_PLANNED_SHARE = 0.9
"""The share of the period that the plan uses. The rest is a reserve for delays."""


@dataclass(frozen=True)
class Unit:
    """A chunk of a segment, with its size in bytes, and the start of its last verification in seconds since 1970."""

    segment: str
    chunk: int
    bytes: int
    verified: float


@dataclass(frozen=True)
class Plan:
    """The chunk to verify next, the time to wait before it, and the read rate."""

    unit: Unit
    wait_seconds: float
    bytes_per_second: float


def plan(units: Sequence[Unit], *, now: float, period_seconds: float, suspect_since: float = 0.0) -> Plan:
    """Plan the next verification. There must be at least one unit.

    Args:
        suspect_since: a time in seconds since 1970; units with an earlier verification are due at once.
    """
    in_order = sorted(units, key=lambda unit: (unit.verified, unit.segment, unit.chunk))
    first = in_order[0]
    if first.verified < suspect_since:
        return Plan(first, 0.0, FASTEST_BYTES_PER_SECOND)
    # If the clock was ahead before, recorded times may lie in the future.
    last = min(in_order[-1].verified, now)
    needed = _needed_bytes_per_second(in_order, last, _PLANNED_SHARE * period_seconds)
    wait = max(0.0, last + first.bytes / needed - now)
    return Plan(first, wait, max(needed, SLOWEST_BYTES_PER_SECOND))


def _needed_bytes_per_second(in_order: Sequence[Unit], since: float, period_seconds: float) -> float:
    """Return the lowest rate that verifies each unit before its deadline, from `since` on.

    If no rate up to the fastest meets all deadlines, return the fastest.
    """
    sums = accumulate(unit.bytes for unit in in_order)
    rates = [0.0]
    for unit, before_deadline in zip(in_order, sums, strict=True):
        left = unit.verified + period_seconds - since
        rates.append(before_deadline / left if left > 0 else FASTEST_BYTES_PER_SECOND)
    return min(max(rates), FASTEST_BYTES_PER_SECOND)


def pause_seconds(size: int, took_seconds: float, bytes_per_second: float) -> float:
    """Return how long to pause after reading a block. The pause is at least as long as the read, so even a slow disk is
    free for other readers half of the time."""
    return max(took_seconds, size / bytes_per_second - took_seconds)
