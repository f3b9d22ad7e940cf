"""The JSON answer of /v1/lookup.

    {"version": 12, "keys": 500, "features": {"docs:ctr": [0.5, null, ...], ...},
     "status": {"docs": ["PRESENT", "NOT_FOUND", ...]},
     "event_timestamps": {"docs": ["2025-01-31T12:00:00Z", null, ...]}}

Lists have one item a key, in the order asked. Statuses and event times are those of a view's rows.
"""

from engine.encoders.json_values import Fragments, dumps, values_of
from engine.result import LookupResult

MEDIA_TYPE = "application/json"


def encode(result: LookupResult) -> bytes:
    """The answer as JSON.

    Raises:
        LookupInvalid: a time is beyond what RFC 3339 can say.
    """
    fragments = Fragments()
    return dumps(
        {
            "version": result.version,
            "keys": result.keys,
            "features": {column.reference: values_of(column) for column in result.columns},
            "status": {view: fragments.statuses(rows.status) for view, rows in result.views.items()},
            "event_timestamps": {view: fragments.event_timestamps(rows) for view, rows in result.views.items()},
        }
    )
