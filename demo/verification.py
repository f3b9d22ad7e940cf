"""Check the server's responses against the feature tables, which are read with pyarrow only, not with Shoal."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa

from demo.client import ARROW, JSON, Client, body
from shoal.spark_export.views.definition import FeatureDefinition, ViewDefinition

_SHOWN = 3
_CLOCK_SLACK = timedelta(minutes=1)


@dataclass(frozen=True)
class Verified:
    """The result of a comparison: the number of values, the number that are equal only within a tolerance, and a
    description of each wrong value."""

    compared: int = 0
    within_tolerance: int = 0
    wrong: tuple[str, ...] = ()

    def __add__(self, other: "Verified") -> "Verified":
        return Verified(
            self.compared + other.compared, self.within_tolerance + other.within_tolerance, self.wrong + other.wrong
        )


def verify_values(client: Client, view: ViewDefinition, table: pa.Table) -> Verified:
    """Look up all rows of a feature table, including those older than the view's TTL, and compare all values."""
    references = [f"{view.name}:{feature.name}" for feature in view.features]
    keys = _keys(view, table)
    answer = client.lookup(body(keys, features=references, stale="serve"), ARROW).table()
    total = Verified()
    for feature, reference in zip(view.features, references, strict=True):
        found = answer.column(reference)
        expected = table.column(feature.name).cast(found.type).to_pylist()
        total += _compare(reference, feature, keys, expected, found.to_pylist())
    return total


def verify_gone(client: Client, view: ViewDefinition, before: pa.Table, after: pa.Table) -> Verified:
    """Check that a lookup does not find keys that are no longer in the feature table."""
    left = set(zip(*_keys(view, before).values(), strict=True)) - set(zip(*_keys(view, after).values(), strict=True))
    if not left:
        return Verified()
    keys = dict(zip((key.name for key in view.join_keys), map(list, zip(*left, strict=True)), strict=True))
    answer = client.lookup(body(keys, features=[f"{view.name}:{view.features[0].name}"]), JSON).json()
    found = [status for status in answer["status"][view.name] if status != "NOT_FOUND"]
    wrong = (f"{view.name}: of {len(left)} keys that are gone, {len(found)} are found",) if found else ()
    return Verified(len(left), 0, wrong)


def verify_ages(client: Client, view: ViewDefinition, table: pa.Table) -> Verified:
    """Check that a row is OUTSIDE_MAX_AGE if it is older than the view's TTL, and only then. `compared` counts such
    rows."""
    if view.ttl is None or view.timestamp_field is None:
        return Verified()
    oldest = datetime.now(UTC) - view.ttl
    times = table.column(view.timestamp_field).cast(pa.timestamp("us", tz="UTC")).to_pylist()
    keys = _keys(view, table)
    answer = client.lookup(body(keys, features=[f"{view.name}:{view.features[0].name}"]), JSON).json()
    old = 0
    wrong = []
    for row, (time, status) in enumerate(zip(times, answer["status"][view.name], strict=True)):
        expected = "OUTSIDE_MAX_AGE" if time < oldest else "PRESENT"
        old += time < oldest
        # A row may reach its TTL after this process read the clock and before the server reads it: accept either
        # status.
        if status != expected and abs(time - oldest) > _CLOCK_SLACK:
            wrong.append(f"{view.name} of {_key(keys, row)}: expected {expected}, got {status}")
    return Verified(old, 0, tuple(wrong[:_SHOWN]))


def _key(keys: Mapping[str, list[Any]], row: int) -> str:
    return ", ".join(str(column[row]) for column in keys.values())


def _keys(view: ViewDefinition, table: pa.Table) -> dict[str, list[Any]]:
    return {key.name: table.column(key.name).to_pylist() for key in view.join_keys}


def _compare(
    reference: str, feature: FeatureDefinition, keys: Mapping[str, list[Any]], expected: list[Any], found: list[Any]
) -> Verified:
    if len(found) != len(expected):
        return Verified(0, 0, (f"{reference}: asked for {len(expected)} values, got {len(found)}",))
    wrong: list[str] = []
    near = 0
    for row, (right, value) in enumerate(zip(expected, found, strict=True)):
        if right == value:
            continue
        if feature.tolerance and None not in (right, value) and abs(right - value) <= feature.tolerance:
            near += 1
        elif len(wrong) < _SHOWN:
            wrong.append(f"{reference} of {_key(keys, row)}: expected {right!r}, got {value!r}")
    return Verified(len(expected), near, tuple(wrong))
