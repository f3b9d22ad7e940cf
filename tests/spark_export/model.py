"""The rules of change detection in plain Python: over whole rows, in memory, without hashes and without Spark."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from tests.spark_export.lab import KEY, TIMESTAMP, Row, plain


@dataclass
class Expected:
    """The rows and tombstones that a run should publish, by key, and the counts that it should report."""

    rows: dict[str, Row]
    tombstones: dict[str, datetime]
    counts: Counter[str]


@dataclass
class Model:
    """A view with the join key `doc_id`, and the rows shipped so far."""

    features: Sequence[str]
    tolerances: Mapping[str, float]
    ttl: timedelta
    shipped: dict[str, Row] = field(default_factory=dict)
    gone: dict[str, datetime] = field(default_factory=dict)
    low_watermark: datetime | None = None
    """The low watermark: the oldest event time of the source. A source of fewer than 100 rows has no stragglers."""
    own_age: dict[str, bool | None] = field(default_factory=dict)
    """Key → whether a node judges the shipped row by its own event time alone; None if the source went back in time."""

    def export(self, source: Sequence[Row], now: datetime, *, full: bool) -> Expected:
        """Apply one run, and return what it should publish."""
        newest: dict[str, Row] = {}
        for row in source:
            if row[KEY] not in newest or row[TIMESTAMP] > newest[row[KEY]][TIMESTAMP]:
                newest[row[KEY]] = row
        counts = Counter(duplicates=len(source) - len(newest), rows_read=len(source))
        oldest = min(row[TIMESTAMP] for row in source)
        stands_still = not full and any(self.own_age[key] is None for key in self.shipped)
        if self.low_watermark is None or not stands_still:
            self.low_watermark = max(self.low_watermark, oldest) if self.low_watermark else oldest
        if full:
            self.shipped = dict(newest)
            self.gone = {}
            self.own_age = {key: row[TIMESTAMP] < self.low_watermark for key, row in newest.items()}
            counts["new"] = len(newest)
            return Expected(newest, {}, counts)
        # A removed key older than the TTL need not be remembered, because no older row of it can be served.
        self.gone = {key: moment for key, moment in self.gone.items() if moment >= now - self.ttl}
        rows: dict[str, Row] = {}
        for key, row in newest.items():
            verdict = self._verdict(key, row, now)
            counts[verdict] += 1
            went_back = verdict == "late" or (verdict == "unchanged" and row[TIMESTAMP] < self.shipped[key][TIMESTAMP])
            self.own_age[key] = None if went_back else row[TIMESTAMP] < self.low_watermark
            if verdict in ("new", "changed", "refreshed"):
                rows[key] = row
        tombstones = {key: row[TIMESTAMP] for key, row in self.shipped.items() if key not in newest}
        counts["removed"] = len(tombstones)
        self.gone = {key: moment for key, moment in (self.gone | tombstones).items() if key not in rows}
        self.shipped = {key: row for key, row in (self.shipped | rows).items() if key not in tombstones}
        return Expected(rows, tombstones, counts)

    def _verdict(self, key: str, row: Row, now: datetime) -> str:
        if key in self.gone:
            return "new" if row[TIMESTAMP] >= self.gone[key] else "late"
        if key not in self.shipped:
            return "new"
        before = self.shipped[key]
        if not all(self._is_same(name, row.get(name), before.get(name)) for name in self.features):
            return "changed" if row[TIMESTAMP] >= before[TIMESTAMP] else "late"
        assert self.low_watermark is not None
        if row[TIMESTAMP] < before[TIMESTAMP]:
            return "unchanged"
        own_age = row[TIMESTAMP] < self.low_watermark
        if self.own_age[key] != own_age:
            return "refreshed"
        # The runs follow each other within moments, so a row is refreshed only after its TTL has ended.
        judged_by = before[TIMESTAMP] if own_age else max(before[TIMESTAMP], self.low_watermark)
        return "refreshed" if row[TIMESTAMP] > judged_by and judged_by + self.ttl < now else "unchanged"

    def _is_same(self, name: str, new: Any, old: Any) -> bool:
        if plain(new) == plain(old):
            return True
        return name in self.tolerances and None not in (new, old) and abs(new - old) <= self.tolerances[name]
