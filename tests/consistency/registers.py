"""Two views in which every row shows which write made it, in every feature but one.

A write's stamp is its place in the order of event times. `stamp >> 1` is its event time in microseconds. Of two writes
with the same event time, the one with the larger stamp is made later, by the same client. So a key must show the row
with the largest stamp among the written rows. The only feature that partial writes leave out is `kept`: the stamp of
the last write of all features.
"""

import random
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from tests import stores

VIEWS = ("left", "right")
SCHEMAS = {
    view: stores.schema(
        view, key="int64", stamp="int64", half="float64", text="string", words="list<string>", kept="int64"
    )
    for view in VIEWS
}
FEATURES = [f"{view}:{feature.name}" for view in VIEWS for feature in SCHEMAS[view].features]
PUSHERS = 3
GROUP_KEYS = 6
GROUPS = [range(group * GROUP_KEYS, (group + 1) * GROUP_KEYS) for group in range(PUSHERS + 2)]
"""Keys that are written together: one group for each pusher, and two groups that are published and never pushed."""
PUBLISHED_ONLY = [key for group in GROUPS[PUSHERS:] for key in group]
KEYS = [key for group in GROUPS for key in group]

_WRITERS = 16
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Torn(Exception):
    """A row that nobody wrote: its features come from different writes, keys or views."""


@dataclass(frozen=True)
class Shown:
    """The stamps that a row shows."""

    stamp: int
    kept: int | None


class Stamps:
    """The stamps of one writer. No two writers make the same event time, and no writer makes one twice."""

    def __init__(self, writer: int) -> None:
        assert writer < _WRITERS
        self._writer = writer
        self._used: set[int] = set()

    def new(self, late_seconds: float = 0) -> int:
        """Return a stamp for the current time, or for a time `late_seconds` ago."""
        tick = int((time.time() - late_seconds) * 1e6) // _WRITERS
        while tick in self._used:
            tick += 1
        self._used.add(tick)
        return (tick * _WRITERS + self._writer) << 1


def twin(stamp: int) -> int:
    """Return the stamp of a second write with the same event time."""
    return stamp | 1


def event_time(stamp: int) -> datetime:
    return _EPOCH + timedelta(microseconds=stamp >> 1)


def row(view: str, key: int, stamp: int, *, whole: bool = True) -> dict[str, Any]:
    """Return the features that a write gives to a key."""
    features: dict[str, Any] = {
        "stamp": stamp,
        "half": stamp / 2,
        "text": f"{view} {key} {stamp}" + "x" * (stamp % 50),
        "words": [str(stamp)] * (stamp % 4),
    }
    return features | ({"kept": stamp} if whole else {})


def shown(view: str, key: int, features: Mapping[str, Any]) -> Shown:
    """Return the stamps that a row shows, or raise Torn."""
    stamp = features["stamp"]
    expected = row(view, key, stamp, whole=False) if isinstance(stamp, int) else None
    if expected is None or any(features[name] != value for name, value in expected.items()):
        raise Torn(f"{view} {key} is {dict(features)}")
    return Shown(stamp, features["kept"])


def rows_shown(keys: Sequence[int], columns: Mapping[str, Sequence[Any]]) -> dict[str, dict[int, Shown | None]]:
    """Return the row of each view and key in an answer, by its columns `view:feature`; None if there is no row.

    Raises:
        Torn: nobody wrote such a row.
    """
    answer: dict[str, dict[int, Shown | None]] = {}
    for view in VIEWS:
        names = [feature.name for feature in SCHEMAS[view].features]
        rows = [
            dict(zip(names, values, strict=True))
            for values in zip(*(columns[f"{view}:{n}"] for n in names), strict=True)
        ]
        answer[view] = {
            key: None if all(value is None for value in features.values()) else shown(view, key, features)
            for key, features in zip(keys, rows, strict=True)
        }
    return answer


def some_keys(source: random.Random) -> list[int]:
    """Return keys for a read: all keys of some groups, so that keys that are written together are read together."""
    return [key for group in source.sample(GROUPS, source.choice([1, 2])) for key in group]


class Counts:
    """Counters of events by name, for many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.by_name: dict[str, int] = {}

    def add(self, name: str) -> None:
        with self._lock:
            self.by_name[name] = self.by_name.get(name, 0) + 1

    def have(self, names: Sequence[str], least: int) -> bool:
        """Return whether each of some events happened at least `least` times."""
        with self._lock:
            return all(self.by_name.get(name, 0) >= least for name in names)
