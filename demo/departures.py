"""The departures of one hour, which a ranker is asked about."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

_NO_PLANE = "unassigned"
"""Stands for the plane where the data name none, which is so of most cancelled flights; no view has it."""


@dataclass(frozen=True)
class Departure:
    """One scheduled departure, and how late it was in the end; None if it was cancelled."""

    carrier: str
    flight: int
    tailnum: str
    origin: str
    dest: str
    delay: int | None


def departures(source: Path, day: date, hour: int) -> list[Departure]:
    """The departures that were scheduled in an hour of a day of 2013, in New York's time."""
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
    """The join keys of all four views: a plane, a route, a carrier and the airport of departure for each flight."""
    return {
        "tailnum": [flight.tailnum for flight in flights],
        "origin": [flight.origin for flight in flights],
        "dest": [flight.dest for flight in flights],
        "carrier": [flight.carrier for flight in flights],
        "faa": [flight.origin for flight in flights],
    }
