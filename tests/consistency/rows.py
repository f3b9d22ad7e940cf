"""Rows that reveal every mixture of versions. All rows of a version contain the same number, as number, text and list,
together with their key."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from shoal import LookupResult
from shoal.engine.kernels.gathering import Status
from tests import stores

KEYS = 150
VIEW = stores.schema(
    "doc",
    key="int64",
    number="int64",
    sum="int64",
    small="float32",
    text="string",
    words="list<string>",
    at="float32[3]",
)
FEATURES = [f"doc:{feature.name}" for feature in VIEW.features]
GONE = 7
"""One key in this many is deleted in every odd version, and present in every even one."""


def rows(number: int) -> list[stores.Row]:
    """Return all live rows of a version."""
    return [row(number, key) for key in range(KEYS) if not _is_gone(number, key)]


def tombstones(number: int) -> list[stores.Row]:
    """Return the keys that are deleted in a version."""
    return [{"doc_id": key} for key in range(KEYS) if _is_gone(number, key)]


def row(number: int, key: int) -> stores.Row:
    return {
        "doc_id": key,
        "number": number,
        "sum": _sum(number, key),
        "small": float(number % 1000),
        "text": f"{number}:{key}:" + "x" * (number % 50),
        "words": [str(number)] * (number % 4),
        "at": [number % 100, key, number % 100 + key],
    }


def number_of(result: LookupResult, keys: Sequence[int]) -> int:
    """Return the number that all rows of an answer agree on.

    Raises:
        AssertionError: the rows do not agree, or a row is not consistent in itself.
    """
    numbers = {int(number) for number in result["doc:number"].values[result["doc:number"].valid == 1]}
    assert len(numbers) == 1, f"versions are mixed: {sorted(numbers)} in version {result.version}"
    (number,) = numbers
    expected = [None if _is_gone(number, key) else row(number, key) for key in keys]
    statuses = [Status.PRESENT if values else Status.NOT_FOUND for values in expected]
    assert result.views["doc"].status.tolist() == statuses, f"version {result.version} has other rows than {number}"
    found = result.to_pydict()
    for name in ("number", "sum", "small", "text", "words", "at"):
        wanted: list[Any] = [values[name] if values else None for values in expected]
        assert found[f"doc:{name}"] == wanted, f"{name} is torn in version {result.version}"
    return number


def _sum(number: int, key: int) -> int:
    return int(np.int64(number) * 1_000_003 + key * 7_919)


def _is_gone(number: int, key: int) -> bool:
    return number % 2 == 1 and key % GONE == 0
