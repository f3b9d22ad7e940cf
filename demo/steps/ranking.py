"""Steps: load the store; rank the departures of an hour; measure the speed of the ranking."""

import json
import time
from collections.abc import Sequence

from demo import server
from demo.client import ARROW, JSON, Answer, Client, Load, Measured
from demo.departures import departures
from demo.errors import DemoFailed
from demo.ranker import SHOWN, Ranked, Ranker, mean_delay, ranking_table
from demo.setting import Setting, named

_HOUR = 17


def load_store(setting: Setting) -> None:
    """Run `shoal load`."""
    terminal = setting.terminal
    workspace = setting.workspace
    terminal.heading("Load")
    command = [str(server.shoal()), "load", "--store", str(workspace.store), "--from", str(workspace.root)]
    terminal.command(command)
    started = time.monotonic()
    applied = json.loads(server.run([*command, "--json"]))["applied"]
    seconds = time.monotonic() - started
    work = sum(entry["seconds"] for entry in applied)
    snapshots = sum(entry["kind"] == "snapshot" for entry in applied)
    told = f"{snapshots} snapshots and {len(applied) - snapshots} deltas in {seconds:.1f} s"
    terminal.say(f"{told}, {seconds - work:.1f} s of it to start and to end.")
    terminal.finding("loaded", told)


def rank(setting: Setting, client: Client) -> Ranker:
    """Rank the departures with the features as of the last loaded day."""
    calendar = setting.calendar
    flights = departures(setting.workspace.source, calendar.in_2013(calendar.ranked), _HOUR)
    ranker = Ranker(flights, setting.views_file)
    setting.terminal.heading(f"Serve, and rank the departures of {named(calendar.ranked)}, {_HOUR}:00 to {_HOUR}:59")
    setting.terminal.say(
        f"Two workers serve. A request asks for the planes, routes, carriers and airports of all {len(flights)} "
        f"departures: {4 * len(flights)} rows, as of {named(calendar.replayed[-1])}.\n"
        "Delays are in minutes; the model does not know the actual delays. The last columns are the model's inputs.\n"
    )
    show_ranking(setting, ranker.rank(client))
    return ranker


def show_ranking(setting: Setting, ranked: Sequence[Ranked]) -> None:
    """Print the first departures of a ranking, and their mean actual delay."""
    setting.terminal.show(ranking_table(ranked))
    setting.terminal.say(
        f"\nThe first {SHOWN} were actually {mean_delay(ranked[:SHOWN]):.0f} minutes late on average, all "
        f"{len(ranked)} {mean_delay(ranked):.0f} minutes."
    )


def measure(setting: Setting, port: int, ranker: Ranker) -> None:
    """Repeat the request in each response format, and read each response as a client would."""
    seconds = setting.measure_seconds
    setting.terminal.say(
        f"\nThe same request, in a closed loop on two connections of one Python client, {seconds:g} s per response "
        "format:\n"
    )

    def as_arrow(client: Client) -> Answer:
        answer = client.lookup(ranker.request, ARROW)
        answer.table()
        return answer

    def as_json(client: Client) -> Answer:
        answer = client.lookup(ranker.request, JSON)
        answer.json()
        return answer

    for name, ask in {"NumPy, scored": ranker.score, "Arrow": as_arrow, "JSON": as_json}.items():
        with Load(port, ask) as measured:
            time.sleep(seconds)
        check(measured)
        setting.terminal.say(f"  {name:<15}{told(measured)}")
        setting.terminal.finding(f"{4 * len(ranker.flights)} rows as {name}", told(measured))


def told(measured: Measured) -> str:
    """Return a measurement as text."""
    return (
        f"p50 {measured.milliseconds(50):.2f} ms, p99 {measured.milliseconds(99):.2f} ms, "
        f"{measured.per_second:,.0f} requests/s"
    )


def check(measured: Measured) -> None:
    """Raise DemoFailed if a request failed, or no request was sent."""
    if measured.failed or not measured.seconds:
        raise DemoFailed(f"{measured.failed} requests failed, such as: {'; '.join(measured.errors) or 'none was sent'}")
