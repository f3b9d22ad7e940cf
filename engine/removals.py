"""How long a removed key is remembered, with its event time, so that a row which is older does not bring it back.

The exporter's state and the stores of nodes keep the same time.
"""

from datetime import timedelta

REMOVALS_KEPT = timedelta(days=30)
"""For views without a time to live."""


def removals_kept(ttl: timedelta | None) -> timedelta:
    """How old, in event time, a removed key gets before it is forgotten: as old as its rows would be served."""
    return ttl or REMOVALS_KEPT
