"""The JSON answer of /v1/lookup.

    {"version": 12, "keys": 500, "features": {"docs:ctr": [0.5, null, ...], ...},
     "status": {"docs": ["PRESENT", "NOT_FOUND", ...]},
     "event_timestamps": {"docs": ["2025-01-31T12:00:00Z", null, ...]}}

Lists have one item per key, in the requested order. Statuses and event times are those of a view's rows.
"""

from collections.abc import Mapping
from functools import lru_cache

from shoal.engine.encoders.json_values import dumps, event_times_of, row_statuses, values_of
from shoal.engine.lookup.allowance import UNLIMITED, Allowance
from shoal.engine.lookup.result import LookupResult

MEDIA_TYPE = "application/json"


def encode(result: LookupResult, allowance: Allowance = UNLIMITED) -> bytes:
    """Return the answer as JSON; raise RequestTooLarge if it is over the allowance."""
    values = [values_of(part, allowance) for part in result.parts]
    features = {
        reference: values[part][column]
        for reference, (part, column) in zip(result.plan.references, result.plan.order, strict=True)
    }
    return b'{"version":%d,"keys":%d,"features":%b,"status":%b,"event_timestamps":%b}' % (
        result.version,
        result.keys,
        _object(features),
        _object({part.rows.view: row_statuses(part.rows.status) for part in result.parts}),
        _object({part.rows.view: event_times_of(part.rows) for part in result.parts}),
    )


def _object(members: Mapping[str, bytes]) -> bytes:
    """Return a JSON object from members that are already JSON."""
    return b"{" + b",".join([_name(name) + value for name, value in members.items()]) + b"}"


@lru_cache(maxsize=4096)
def _name(name: str) -> bytes:
    return dumps(name) + b":"
