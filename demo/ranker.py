"""Rank the departures of an hour by the delay that the model expects, and show the features behind the ranking."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from demo.client import JSON, NPY, Answer, Client, body
from demo.departures import Departure, entities
from demo.model import SERVICE, WEIGHTS, Matrix, expected_delays, weights_of_columns
from demo.terminal import plain_table
from shoal.spark_export.views.definition import ViewsFile

SHOWN = 10
PRESENT = "PRESENT"
_MORE_SHOWN = 3
_MODEL = "planes:model"


@dataclass(frozen=True)
class Ranked:
    """A departure with its expected delay in minutes. Each shown feature is a value, "null" or its row's status."""

    departure: Departure
    expected: float
    plane_status: str
    model: str
    features: tuple[str, ...]


class Ranker:
    """Ranks a list of departures, each time with the server's current features."""

    def __init__(self, flights: Sequence[Departure], views_file: ViewsFile) -> None:
        self.flights = tuple(flights)
        self.request = body(entities(self.flights), service=SERVICE)
        self._explained_request = body(entities(self.flights), features=[*WEIGHTS, _MODEL])
        self._weights = weights_of_columns(views_file)

    def score(self, client: Client) -> Answer:
        """Look up the features of all candidates and score them, as a ranker does for each query."""
        answer = client.lookup(self.request, NPY)
        self._expected(answer)
        return answer

    def rank(self, client: Client) -> list[Ranked]:
        """Return all departures, with the longest expected delay first."""
        expected = self._expected(client.lookup(self.request, NPY))
        explained = client.lookup(self._explained_request, JSON).json()
        ranked = []
        for row, flight in enumerate(self.flights):
            features = []
            for reference in WEIGHTS:
                status = explained["status"][reference.partition(":")[0]][row]
                features.append(_shown(explained["features"][reference][row]) if status == PRESENT else status)
            ranked.append(
                Ranked(
                    departure=flight,
                    expected=float(expected[row]),
                    plane_status=explained["status"]["planes"][row],
                    model=_shown(explained["features"][_MODEL][row]),
                    features=tuple(features),
                )
            )
        return sorted(ranked, key=lambda one: -one.expected)

    def example(self, client: Client) -> Departure:
        """Return the first departure of the ranking with a row for its plane."""
        return next(one.departure for one in self.rank(client) if one.plane_status == PRESENT)

    def _expected(self, answer: Answer) -> Matrix:
        return expected_delays(answer.matrix(), self._weights)


def ranking_table(ranked: Sequence[Ranked]) -> Table:
    """Return a table of the first departures of a ranking, and of a few later ones without a row for their plane."""
    features = [reference.replace(":delay_mean_", "\n") for reference in WEIGHTS]
    names = ("rank", "expected", "actual", "flight", "route", "plane", "model", *features)
    table = plain_table(*names, right=(*names[:3], *features))
    without_plane = [place for place in range(SHOWN, len(ranked)) if ranked[place].plane_status != PRESENT]
    for place in [*range(min(SHOWN, len(ranked))), *without_plane[:_MORE_SHOWN]]:
        one = ranked[place]
        flight = one.departure
        table.add_row(
            str(place + 1),
            f"{one.expected:.1f}",
            "cancelled" if flight.delay is None else str(flight.delay),
            f"{flight.carrier} {flight.flight}",
            f"{flight.origin}-{flight.dest}",
            flight.tailnum,
            one.model,
            *one.features,
        )
    return table


def mean_delay(ranked: Sequence[Ranked]) -> float:
    """Return the mean actual delay in minutes of the flights that departed."""
    delays = [one.departure.delay for one in ranked if one.departure.delay is not None]
    return sum(delays) / len(delays) if delays else float("nan")


def _shown(value: float | str | None) -> str:
    if value is None:
        return "null"
    return value if isinstance(value, str) else f"{value:.1f}"
