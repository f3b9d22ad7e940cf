"""The checker accepts a history that keeps every promise, and names the violation in each history that breaks one."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.consistency.checker import check, check_end
from tests.consistency.history import Events, History, Read, Write, Wrong, read_events
from tests.consistency.registers import FEATURES, Shown, Torn, row, rows_shown, twin

FIRST = Write("publisher", "left", 10, [0, 1], [], begun=0, acknowledged=0)
PUSH = Write("pusher", "left", 20, [0, 1], [], begun=100, acknowledged=110, version=5)
PART = Write("pusher", "left", 30, [0, 1], [], begun=200, acknowledged=210, version=6, whole=False)
DELETION = Write("pusher", "left", 40, [0], [1], begun=300, acknowledged=310, version=7)
WRITES = [FIRST, PUSH, PART, DELETION]


def shows(first: Shown | None, second: Shown | None, *, at: int, version: int, client: str = "reader") -> Read:
    return Read(client, at, at + 5, version, {"left": {0: first, 1: second}})


def whole(stamp: int) -> Shown:
    return Shown(stamp, stamp)


GOOD = [
    shows(whole(10), whole(10), at=50, version=4),
    shows(whole(20), whole(20), at=105, version=5),
    shows(Shown(30, 20), Shown(30, 20), at=205, version=6),
    shows(whole(40), None, at=400, version=7),
]


def test_nothing_is_wrong_with_what_keeps_all_promises() -> None:
    assert check(Events(WRITES, GOOD)) == []
    assert check_end(GOOD[-1], WRITES) == []


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        (shows(whole(10), whole(10), at=150, version=5), "lost"),
        (shows(None, whole(20), at=150, version=5), "lost"),
        (shows(whole(20), whole(10), at=102, version=5), "torn push"),
        (shows(whole(40), Shown(30, 20), at=305, version=7), "torn push"),
        (shows(whole(15), whole(20), at=150, version=5), "unwritten"),
        (shows(whole(30), whole(30), at=150, version=5), "unwritten"),
        (shows(Shown(20, 10), whole(20), at=150, version=5), "torn row"),
        (shows(Shown(30, 10), Shown(30, 20), at=250, version=6), "lost"),
        (shows(Shown(30, None), Shown(30, 20), at=250, version=6), "lost"),
        (shows(Shown(30, 25), Shown(30, 20), at=250, version=6), "unwritten"),
        (shows(whole(20), whole(20), at=150, version=4, client="other"), "stale"),
        (shows(whole(40), None, at=500, version=6), "backwards"),
        (shows(whole(20), whole(20), at=150, version=4), "two answers"),
        (shows(whole(20), whole(20), at=150, version=7), "older again"),
    ],
)
def test_what_breaks_a_promise_is_named(bad: Read, kind: str) -> None:
    assert kind in {wrong.kind for wrong in check(Events(WRITES, [*GOOD, bad]))}


def test_a_second_application_of_a_push_is_named() -> None:
    second = replace(PUSH, stamp=twin(PUSH.stamp), begun=120, acknowledged=130)
    bad = shows(whole(20), whole(20), at=150, version=6)
    assert {wrong.kind for wrong in check(Events([FIRST, PUSH, second], [bad]))} == {"applied twice"}


def test_a_view_that_lacks_what_the_other_was_written_after_is_named() -> None:
    """In one read, neither view may be of an older version than the other."""
    right = replace(PUSH, view="right", begun=150, acknowledged=None)
    mixed = Read("reader", 90, 160, 5, {"left": {0: whole(10)}, "right": {0: whole(20)}})
    assert [wrong.kind for wrong in check(Events([FIRST, PUSH, right], [mixed]))] == ["lost"]


def test_what_is_not_there_in_the_end_is_named() -> None:
    assert [wrong.kind for wrong in check_end(GOOD[2], WRITES)] == ["end", "end"]


def test_rows_of_which_features_are_mixed_are_torn() -> None:
    parts = [feature.partition(":") for feature in FEATURES]
    by_view = {f"{view}:{name}": [row(view, 3, 70)[name]] for view, _, name in parts}
    assert rows_shown([3], by_view)["left"] == {3: whole(70)}
    for name in ("stamp", "half", "text", "words"):
        with pytest.raises(Torn):
            rows_shown([3], by_view | {f"left:{name}": [row("left", 3, 75)[name]]})


def test_a_history_is_read_as_it_was_written(tmp_path: Path) -> None:
    wrong = Wrong("torn row", "something")
    with History(tmp_path / "history") as history:
        for write in WRITES:
            history.add(write)
        for read in GOOD:
            history.add(read)
        history.add(wrong)
    assert read_events([tmp_path / "history"]) == Events(WRITES, GOOD, [wrong])
