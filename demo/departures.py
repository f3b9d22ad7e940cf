"""The departures of one hour, to be ranked."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

_NO_PLANE = "unassigned"
"""The placeholder for a flight without a plane in the data, as most cancelled flights are. No view has this key."""


@dataclass(frozen=True)
class Departure:
    """A scheduled departure. `delay` is its actual delay in minutes, or None if it was cancelled."""

    carrier: str
    flight: int
    tailnum: str
    origin: str
    dest: str
    delay: int | None


def departures(source: Path, day: date, hour: int) -> list[Departure]:
    """Return the departures that were scheduled in an hour of a day of 2013, in New York time."""
    scheduled = (pc.field("scheduled_day") == day) & (pc.field("hour") == hour)
    rows = pq.read_table(source / "flights", filters=scheduled).sort_by(
        [("scheduled_at", "ascending"), ("carrier", "ascending"), ("flight", "ascending")]
    )
    return [
        Departure(
            carrier=row["carrier"],
            flight=row["flight"],
            tailnum=row["tailnum"] or _NO_PLANE,
            origin=row["origin"],
            dest=row["dest"],
            delay=row["dep_delay"],
        )
        for row in rows.to_pylist()
    ]


def entities(flights: Sequence[Departure]) -> dict[str, list[str]]:
    """Return the join keys of all four views: for each flight its plane, route, carrier and airport of departure."""
    return {
        "tailnum": [flight.tailnum for flight in flights],
        "origin": [flight.origin for flight in flights],
        "dest": [flight.dest for flight in flights],
        "carrier": [flight.carrier for flight in flights],
        "faa": [flight.origin for flight in flights],
    }
