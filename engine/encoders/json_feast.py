"""The JSON answer of Feast's feature server (POST /get-online-features), so that its clients can stay.

    {"metadata": {"feature_names": ["user_id", "ctr"]},
     "results": [{"values": [7], "statuses": ["PRESENT"], "event_timestamps": ["1970-01-01T00:00:00Z"]}, ...]}

One result a name, join keys first. Types are Feast's: a timestamp is whole seconds since 1970, int64 is a JSON number,
bytes are base64, and a key without a row has the event time 1970-01-01T00:00:00Z.
"""

from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import orjson

from engine.column import Column, ViewRows
from engine.encoders.json_values import Fragments, dumps, nullable, times_of, values_of
from engine.errors import AmbiguousFeature
from engine.result import LookupResult

MEDIA_TYPE = "application/json"

_NO_TIME = b'"1970-01-01T00:00:00Z"'


def encode(result: LookupResult, join_keys: Mapping[str, list[Any]], *, full_feature_names: bool = False) -> bytes:
    """The answer as JSON.

    Args:
        result: what was looked up.
        join_keys: the lists of the request, join key → one value a row.
        full_feature_names: name a feature `view__feature` instead of `feature`.

    Raises:
        AmbiguousFeature: two names in the answer are the same.
        LookupInvalid: a time is beyond what RFC 3339 can say.
    """
    names = [*join_keys, *_names(result.plan.references, full_feature_names)]
    _check_distinct(names)
    fragments = Fragments()
    times = {view: _event_timestamps(rows) for view, rows in result.views.items()}
    present = fragments.statuses(np.ones(result.keys, np.uint8))
    no_times = orjson.Fragment(b"[" + b",".join([_NO_TIME] * result.keys) + b"]")
    results = [
        {"values": values, "statuses": present, "event_timestamps": no_times} for values in join_keys.values()
    ] + [
        {
            "values": _values_of(column),
            "statuses": fragments.statuses(column.status),
            "event_timestamps": times[column.rows.view],
        }
        for column in result.columns
    ]
    return dumps({"metadata": {"feature_names": names}, "results": results})


@lru_cache(maxsize=256)
def _names(references: tuple[str, ...], full: bool) -> list[str]:
    pairs = (reference.split(":") for reference in references)
    return [f"{view}__{name}" if full else name for view, name in pairs]


def _check_distinct(names: list[str]) -> None:
    if len(set(names)) == len(names):
        return
    repeated = ", ".join(name for name, count in Counter(names).items() if count > 1)
    raise AmbiguousFeature(
        f"the answer would have more than one {repeated}; ask for each feature once, and set full_feature_names to "
        f"tell apart those of several views"
    )


def _values_of(column: Column) -> Any:
    if column.feature.type == "timestamp":
        return nullable(column.values.view(np.int64) // 1_000_000, column.valid.view(np.bool_))
    return values_of(column)


def _event_timestamps(rows: ViewRows) -> orjson.Fragment:
    times = rows.event_timestamps
    found = np.where(np.isnat(times), np.datetime64(0, "us"), times)
    return orjson.Fragment(dumps(times_of(found, np.ones(found.size, np.bool_), f"a row of view {rows.view!r}")))
