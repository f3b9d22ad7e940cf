"""Many exports of a source that changes at random, compared with a model of the rules in plain Python."""

import random
from datetime import UTC, datetime, timedelta

import numpy as np

from shoal.engine.format.keys import key_identity
from shoal.engine.root.manifest import EVENT_TIMESTAMP
from tests.spark_export.lab import KEY, TIMESTAMP, Lab, Row, ago, plain
from tests.spark_export.model import Expected, Model

FEATURES = {"clicks": "int64", "rank": "int32", "ctr": "float32", "title": "string", "seen": "list<int64>"}
TOLERANCES = {"rank": 2, "ctr": 0.01}
COUNTS = ("rows_read", "duplicates", "new", "changed", "refreshed", "removed", "late", "unchanged")


class Source:
    """A source whose rows change between runs in every way that the exporter distinguishes."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.rows: dict[str, Row] = {}
        self.dropped: list[Row] = []

    def next(self) -> list[Row]:
        """Return the rows of the next run in random order, with some older duplicates."""
        for _ in range(15):
            key = f"d{self.random.randrange(80)}"
            self.rows[key] = self._change(self.rows[key]) if key in self.rows else self._new(key)
        for key in self.random.sample(sorted(self.rows), 4):
            self.dropped.append(self.rows.pop(key))
        # Some of the dropped rows come back, unchanged or with an earlier event time.
        for row in self.random.sample(self.dropped, 2):
            self.rows.setdefault(row[KEY], row | {TIMESTAMP: row[TIMESTAMP] - self._step() * self.random.randrange(2)})
        duplicates = [self._change(row) | {TIMESTAMP: row[TIMESTAMP] - self._step()} for row in self._some(3)]
        rows = [*self.rows.values(), *duplicates, *self._some(2)]
        self.random.shuffle(rows)
        return rows

    def _new(self, key: str) -> Row:
        row: Row = {KEY: key, TIMESTAMP: ago(days=self.random.choice([0.2, 1, 3, 6]), seconds=self.random.random())}
        return row | {name: self._value(name) for name in FEATURES}

    def _change(self, row: Row) -> Row:
        moved = row[TIMESTAMP] + self._step() * self.random.choice([-1, 0, 0, 1, 1])
        match self.random.randrange(4):
            case 0:
                return row | {TIMESTAMP: row[TIMESTAMP] + self._step()}
            case 1 if row["ctr"] is not None and row["rank"] is not None:
                # One such step is within the tolerance, but a few of them together are not.
                return row | {"ctr": _float32(row["ctr"] + 0.006), "rank": row["rank"] + 1, TIMESTAMP: moved}
            case _:
                name = self.random.choice(list(FEATURES))
                return row | {name: self._value(name), TIMESTAMP: moved}

    def _value(self, name: str) -> object:
        values: dict[str, list[object]] = {
            "clicks": [None, 0, 1, -5, 2**62],
            "rank": [None, 0, 10, 2**31 - 10, -(2**31)],
            "ctr": [None, 0.0, -0.0, 0.25, float("nan"), float("inf"), float("-inf")],
            "title": [None, "", "a", "ä€😀"],
            "seen": [None, [], [1], [1, 2], [2, 1]],
        }
        return self.random.choice(values[name])

    def _some(self, count: int) -> list[Row]:
        return [self.rows[key] for key in self.random.sample(sorted(self.rows), count)]

    def _step(self) -> timedelta:
        return timedelta(hours=3, microseconds=self.random.randrange(10**6))


def _float32(value: float) -> float:
    return float(np.float32(value))


def test_every_run_publishes_what_the_rules_say(lab: Lab) -> None:
    lab.define(FEATURES, tolerances=TOLERANCES, ttl="4d")
    source = Source(seed=1)
    model = Model(list(FEATURES), TOLERANCES, timedelta(days=4))
    for run in range(8):
        rows = source.next()
        full = run in (0, 5)
        lab.put(rows)
        report = lab.export(full=full)
        expected = model.export(rows, datetime.now(UTC), full=full)
        assert {name: getattr(report, name) for name in COUNTS} == {name: expected.counts[name] for name in COUNTS}
        assert report.kind == ("snapshot" if full else "delta")
        _assert_published(lab, expected)
        assert lab.newest().low_watermark == model.low_watermark
        _assert_judged_truly(lab, rows)
        assert lab.newest().live_rows == len(model.shipped)
        assert lab.newest().values == {name: _values_of(model, name) for name in FEATURES}
        assert _live(lab.served()) == _live({(key,): _as_served(row) for key, row in model.shipped.items()})


def _assert_published(lab: Lab, expected: Expected) -> None:
    rows, tombstones = lab.published(lab.newest())
    assert _values(rows) == _values({(key,): _as_served(row) for key, row in expected.rows.items()})
    assert tombstones == {key_identity([key]): moment for key, moment in expected.tombstones.items()}


def _assert_judged_truly(lab: Lab, source: list[Row]) -> None:
    """Assert that each row on a node has the right age for its source.

    No row is younger than in the source, and a row is too old to be served only if the source's row is. A row keeps its
    age if the source went back in time.
    """
    newest: dict[str, datetime] = {}
    for row in source:
        newest[row[KEY]] = max(row[TIMESTAMP], newest.get(row[KEY], row[TIMESTAMP]))
    judged = lab.judged_by()
    assert newest.keys() <= {key for (key,) in judged}
    for key, moment in newest.items():
        shipped, by = judged[key,]
        assert by <= moment or shipped > moment
        assert by > ago(days=4) or moment < ago(days=4) or shipped > moment


def _values_of(model: Model, name: str) -> int:
    return sum(plain(row.get(name)) not in (None, "NaN") for row in model.shipped.values())


def _live(rows: dict[tuple[str | int, ...], Row]) -> dict[tuple[str | int, ...], Row]:
    return {key: row for key, row in _values(rows).items() if row[EVENT_TIMESTAMP] > ago(days=4)}


def _as_served(row: Row) -> Row:
    served = {name: row.get(name) for name in (KEY, *FEATURES)}
    return served | {EVENT_TIMESTAMP: row[TIMESTAMP]}


def _values(rows: dict[tuple[str | int, ...], Row]) -> dict[tuple[str | int, ...], Row]:
    return {key: {name: plain(value) for name, value in row.items()} for key, row in rows.items()}
