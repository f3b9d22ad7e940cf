"""The schedule of the scrub, with a simulated clock: every chunk is verified again within the period."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest

from shoal.loaders.scrub.scrub_pace import (
    FASTEST_BYTES_PER_SECOND,
    SLOWEST_BYTES_PER_SECOND,
    Plan,
    Unit,
    pause_seconds,
    plan,
)

HOUR, DAY = 3600.0, 86_400.0
MIB = 1 << 20
START = 1_800_000_000.0


def units(*sizes_mib: int, verified: float = START) -> list[Unit]:
    return [Unit(f"view/{number:03d}", 0, size * MIB, verified) for number, size in enumerate(sizes_mib)]


def chance(seed: int) -> list[Unit]:
    """Return random units of all sizes, verified at random times in the last day."""
    numbers = random.Random(seed)
    count = numbers.randint(1, 40)
    return [
        Unit(f"v/{n}", n, numbers.randint(1, 400) * MIB, START - numbers.random() * 0.4 * DAY) for n in range(count)
    ]


def run(store: list[Unit], *, until: float, period: float, restarts: float | None = None) -> list[tuple[float, Unit]]:
    """Follow the plan on a simulated clock, and return the start time and the previous state of each verified unit.

    Args:
        restarts: the interval in seconds at which the process ends; the chunk being read at that time is lost.
    """
    now = START
    done = []
    next_restart = now + restarts if restarts else until
    while now < until:
        following = plan(store, now=now, period_seconds=period)
        begun = now + following.wait_seconds
        now = begun + following.unit.bytes / following.bytes_per_second
        if restarts and now > next_restart:
            now = next_restart
            next_restart = next_restart + restarts
            continue
        done.append((begun, following.unit))
        store = [replace(unit, verified=begun) if unit == following.unit else unit for unit in store]
    return done


STORES = [
    units(64),
    units(*[64] * 16),
    units(4, 4, 4, 300, 300, 1),
    units(*range(1, 60)),
    *(chance(seed) for seed in range(20)),
]


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("restarts", [None, 0.11 * DAY])
def test_every_chunk_is_verified_again_within_the_period(store: list[Unit], restarts: float | None) -> None:
    done = run(store, until=START + 5 * DAY, period=DAY, restarts=restarts)
    assert {unit.segment for _, unit in done} == {unit.segment for unit in store}
    assert max(begun - unit.verified for begun, unit in done) < DAY
    # They are not verified much more often than necessary.
    assert len(done) < 8 * len(store)


def test_the_whole_period_is_used() -> None:
    done = run(units(*[64] * 100), until=START + DAY, period=DAY)
    gaps = [later - earlier for (earlier, _), (later, _) in pairwise(done)]
    assert max(gaps) < 2 * DAY / 100
    assert min(gaps) > 0.5 * DAY / 100


def test_what_is_suspect_is_due_at_once_and_as_fast_as_can_be() -> None:
    store = [*units(64, 64, verified=START - 2), Unit("sound", 0, MIB, START)]
    found = plan(store, now=START + 1, period_seconds=DAY, suspect_since=START - 1)
    assert found == Plan(store[0], 0.0, FASTEST_BYTES_PER_SECOND)
    rest = plan(store[2:], now=START + 1, period_seconds=DAY, suspect_since=START - 1)
    assert rest.wait_seconds > HOUR


def test_what_is_late_is_made_up_for() -> None:
    found = plan(units(64, 64), now=START + 3 * DAY, period_seconds=DAY)
    assert found.wait_seconds == 0
    store = [replace(unit, verified=START - 3 * DAY) for unit in units(64, 64)] + units(1)
    assert plan(store, now=START, period_seconds=DAY).bytes_per_second == FASTEST_BYTES_PER_SECOND


def test_a_restart_begins_with_what_was_verified_longest_ago() -> None:
    store = [Unit("v", n, MIB, START - age) for n, age in enumerate((5 * HOUR, 9 * HOUR, HOUR))]
    assert plan(store, now=START, period_seconds=DAY).unit.chunk == 1


def test_a_clock_that_was_ahead_holds_nothing_up() -> None:
    store = units(64, 64, verified=START + 365 * DAY) + units(64)
    assert plan(store, now=START, period_seconds=DAY).wait_seconds < DAY


def test_a_chunk_is_read_in_seconds_and_half_of_the_time_is_left_to_others() -> None:
    assert plan(units(64), now=START, period_seconds=DAY).bytes_per_second == SLOWEST_BYTES_PER_SECOND
    assert pause_seconds(2 * MIB, 0.05, SLOWEST_BYTES_PER_SECOND) == pytest.approx(0.2)
    assert pause_seconds(2 * MIB, 3.0, FASTEST_BYTES_PER_SECOND) == 3.0
