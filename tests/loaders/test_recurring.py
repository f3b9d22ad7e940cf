"""A failure at every poll is logged at once, after each change, then at growing intervals, and once when it ends."""

import logging

import pytest

from shoal.loaders.follow import recurring
from shoal.loaders.follow.recurring import RecurringFailures


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A list whose only element is the current time in seconds."""
    now = [0.0]
    monkeypatch.setattr(recurring, "monotonic", lambda: now[0])
    return now


def test_a_day_of_the_same_failure_is_a_few_lines(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    failures = RecurringFailures(logging.getLogger("test"))
    for clock[0] in range(0, 86400, 5):
        failures.failed("doc", "doc: it is away")
    times = [record.getMessage() for record in caplog.records]
    # At once, after 1, 3, 7, 15, 31 and 63 minutes, and from then on every hour.
    assert times[:3] == ["doc: it is away", "doc: it is away (for 60 s now)", "doc: it is away (for 180 s now)"]
    assert len(times) == 7 + 22
    assert failures.is_failing("doc")
    failures.succeeded("doc")
    failures.succeeded("doc")
    assert [record.getMessage() for record in caplog.records[len(times) :]] == ["doc: recovered after 86395 s"]
    assert not failures.is_failing("doc")


def test_what_changes_is_told_at_once_and_what_always_changes_by_the_clock(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    failures = RecurringFailures(logging.getLogger("test"))
    for message in ("a", "b", "a", "b"):
        failures.failed("doc", message)
    failures.failed("other", "a")
    assert [record.getMessage() for record in caplog.records] == ["a", "b", "a"]
    for number in range(1000):
        failures.failed("doc", f"{number}")
    assert len(caplog.records) == 3 + 14
    clock[0] = 61
    failures.failed("doc", "1001")
    assert len(caplog.records) == 18
