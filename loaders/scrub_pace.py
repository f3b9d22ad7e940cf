"""When the scrub reads which chunk, and how fast. Pure functions of times and sizes; nothing is read here.

Each chunk has to be verified again within a period. The chunk that was verified longest ago comes first, and the next
one begins when the rate that meets all deadlines asks for it. So the schedule needs no list of its own: the time at
which each chunk was verified last is all that there is to keep, and a writer that restarts goes on where it was.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

FASTEST_BYTES_PER_SECOND = 256 << 20
"""The pace after an unclean shutdown, and of a scrub that is late. Half of the time it pauses all the same."""
SLOWEST_BYTES_PER_SECOND = 8 << 20
"""The pace inside a chunk: a restart loses the part of a chunk that was read, which is to be some seconds at most."""
_PLANNED_SHARE = 0.9
"""The share of the period that is planned for: the rest is for what comes up."""


@dataclass(frozen=True)
class Unit:
    """A chunk of a segment: its size, and when its last verification began, in seconds since 1970."""

    segment: str
    chunk: int
    bytes: int
    verified: float


@dataclass(frozen=True)
class Plan:
    """What to verify next, in how many seconds to begin, and how fast to read."""

    unit: Unit
    wait_seconds: float
    bytes_per_second: float


def plan(units: Sequence[Unit], *, now: float, period_seconds: float, suspect_since: float = 0.0) -> Plan:
    """What to verify next of at least one unit.

    Args:
        suspect_since: units that were verified earlier are due at once.
    """
    in_order = sorted(units, key=lambda unit: (unit.verified, unit.segment, unit.chunk))
    first = in_order[0]
    if first.verified < suspect_since:
        return Plan(first, 0.0, FASTEST_BYTES_PER_SECOND)
    # A clock that was ahead and is right again has left times that are still to come.
    last = min(in_order[-1].verified, now)
    needed = _needed_bytes_per_second(in_order, last, _PLANNED_SHARE * period_seconds)
    wait = max(0.0, last + first.bytes / needed - now)
    return Plan(first, wait, max(needed, SLOWEST_BYTES_PER_SECOND))


def _needed_bytes_per_second(in_order: Sequence[Unit], since: float, period_seconds: float) -> float:
    """The least rate from a moment on by which each unit is verified in its time, if that can be."""
    sums = accumulate(unit.bytes for unit in in_order)
    rates = [0.0]
    for unit, before_deadline in zip(in_order, sums, strict=True):
        left = unit.verified + period_seconds - since
        rates.append(before_deadline / left if left > 0 else FASTEST_BYTES_PER_SECOND)
    return min(max(rates), FASTEST_BYTES_PER_SECOND)


def pause_seconds(size: int, took_seconds: float, bytes_per_second: float) -> float:
    """How long to pause behind a block that was read: at least as long as that took, so that half of the time is left
    to others however slow the disk is."""
    return max(took_seconds, size / bytes_per_second - took_seconds)
