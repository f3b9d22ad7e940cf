"""How long tombstones are kept. A tombstone records a removed key and its event time, so that an older row does not
bring the key back.

The exporter's state and the nodes' stores keep tombstones equally long.
"""

from datetime import timedelta

REMOVALS_KEPT = timedelta(days=30)
"""The age limit of tombstones in views without a time to live."""


def removals_kept(ttl: timedelta | None) -> timedelta:
    """Return the age, in event time, at which a tombstone is deleted: the view's time to live, or REMOVALS_KEPT."""
    return ttl or REMOVALS_KEPT
