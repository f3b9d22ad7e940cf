"""The JSON answer of Feast's feature server (POST /get-online-features), so that Feast's clients keep working.

    {"metadata": {"feature_names": ["user_id", "ctr"]},
     "results": [{"values": [7], "statuses": ["PRESENT"], "event_timestamps": ["1970-01-01T00:00:00Z"]}, ...]}

There is one result per name, and the join keys come first. Types are Feast's: a timestamp is whole seconds since 1970,
int64 is a JSON number, bytes are base64, and a key without a row has the event time 1970-01-01T00:00:00Z.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from shoal.engine.encoders.feast_names import answer_names
from shoal.engine.encoders.json_values import (
    dumps,
    event_times_of,
    row_statuses,
    statuses_of,
    values_of,
)
from shoal.engine.format.schema import split_reference
from shoal.engine.kernels.gathering import Status
from shoal.engine.lookup.allowance import UNLIMITED, Allowance
from shoal.engine.lookup.result import LookupResult, ViewColumns

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
    """Return the answer as JSON.

    Args:
        result: the result of the lookup.
        join_keys: join key → the list of the request, with one value per row.
        full_feature_names: name a feature `view__feature` instead of `feature`.
        view_names: list the views in the metadata, as Feast does if view versions are requested. Shoal has only the
            current definition of a view, and Feast gives no version number to the current definition.
        strict: write floats as Feast does, and give a null in an existing row the status PRESENT.
        allowance: the limit on the size of the answer.

    Raises:
        AmbiguousFeature: two names in the answer are the same.
        RequestTooLarge: the answer exceeds the allowance.
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
    """Return the result of each feature of a view, as JSON."""
    of_features = [row_statuses(part.rows.status)] * len(part.valid) if strict else statuses_of(part)
    times = b',"event_timestamps":' + event_times_of(part.rows, _EPOCH) + b"}"
    # `values_of` adds the values to the allowance. The statuses and the times are added here; the times are repeated
    # for each feature.
    allowance.take(sum(map(len, of_features)) + len(of_features) * len(times))
    return [
        b'{"values":' + values + b',"statuses":' + of_feature + times
        for values, of_feature in zip(
            values_of(part, allowance, seconds=True, named_floats=strict), of_features, strict=True
        )
    ]


@lru_cache(maxsize=256)
def _head(join_keys: tuple[str, ...], references: tuple[str, ...], full: bool, view_names: bool) -> bytes:
    """Return the JSON before the results."""
    metadata: dict[str, Any] = {"feature_names": answer_names(join_keys, references, full=full)}
    if view_names:
        metadata["feature_view_metadata"] = [{"name": view} for view in _views(references)]
    return b'{"metadata":%b,' % dumps(metadata)


def _views(references: Sequence[str]) -> dict[str, None]:
    """Return the views of features, each once, in the order of their first mention."""
    return dict.fromkeys(split_reference(reference)[0] for reference in references)
