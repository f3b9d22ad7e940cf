"""The JSON answer of Feast's feature server (POST /get-online-features), so that its clients can stay.

    {"metadata": {"feature_names": ["user_id", "ctr"]},
     "results": [{"values": [7], "statuses": ["PRESENT"], "event_timestamps": ["1970-01-01T00:00:00Z"]}, ...]}

One result a name, join keys first. Types are Feast's: a timestamp is whole seconds since 1970, int64 is a JSON number,
bytes are base64, and a key without a row has the event time 1970-01-01T00:00:00Z.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from engine.allowance import UNLIMITED, Allowance
from engine.encoders.feast_names import answer_names
from engine.encoders.json_values import dumps, event_times_of, row_statuses, statuses_of, values_of
from engine.kernels.gathering import Status
from engine.result import LookupResult, ViewColumns

MEDIA_TYPE = "application/json"

_EPOCH = 0


def encode(
    result: LookupResult,
    join_keys: Mapping[str, list[Any]],
    *,
    full_feature_names: bool = False,
    view_names: bool = False,
    strict: bool = False,
    allowance: Allowance = UNLIMITED,
) -> bytes:
    """The answer as JSON.

    Args:
        result: what was looked up.
        join_keys: the lists of the request, join key → one value a row.
        full_feature_names: name a feature `view__feature` instead of `feature`.
        view_names: list the views in the metadata, as Feast does if view versions are requested. Shoal has only the
            current definition, to which Feast gives no version number.
        strict: write floats as Feast does, and give a null in an existing row the status PRESENT.
        allowance: what the answer may take.

    Raises:
        AmbiguousFeature: two names in the answer are the same.
        RequestTooLarge: it takes more than the allowance.
    """
    head = _head(tuple(join_keys), result.plan.references, full_feature_names, view_names)
    all_present = np.full(result.keys, Status.PRESENT, np.uint8)
    no_times = b",".join([b'"1970-01-01T00:00:00Z"'] * result.keys)
    of_keys = b'{"values":%%b,"statuses":%b,"event_timestamps":[%b]}' % (row_statuses(all_present), no_times)
    columns = [_columns(part, strict, allowance) for part in result.parts]
    results = [of_keys % dumps(values) for values in join_keys.values()]
    results += [columns[part][column] for part, column in result.plan.order]
    return b'%b"results":[%b]}' % (head, b",".join(results))


def _columns(part: ViewColumns, strict: bool, allowance: Allowance) -> list[bytes]:
    """The results of each feature of a view."""
    of_features = [row_statuses(part.rows.status)] * len(part.valid) if strict else statuses_of(part)
    times = b',"event_timestamps":' + event_times_of(part.rows, _EPOCH) + b"}"
    # The times, in addition to the values: they are repeated for each feature.
    allowance.take(sum(map(len, of_features)) + len(of_features) * len(times))
    return [
        b'{"values":' + values + b',"statuses":' + of_feature + times
        for values, of_feature in zip(
            values_of(part, allowance, seconds=True, named_floats=strict), of_features, strict=True
        )
    ]


@lru_cache(maxsize=256)
def _head(join_keys: tuple[str, ...], references: tuple[str, ...], full: bool, view_names: bool) -> bytes:
    """What stands before the results."""
    metadata: dict[str, Any] = {"feature_names": answer_names(join_keys, references, full=full)}
    if view_names:
        metadata["feature_view_metadata"] = [{"name": view} for view in _views(references)]
    return b'{"metadata":%b,' % dumps(metadata)


def _views(references: Sequence[str]) -> dict[str, None]:
    """The views of features, each once, in the order of their first mention."""
    return dict.fromkeys(reference.partition(":")[0] for reference in references)
