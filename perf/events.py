"""Send events for streams at an even rate. Each event contains the time when it was sent: `python -m perf.events
--help`."""

import time
from datetime import UTC, datetime

import click
import orjson
from confluent_kafka import Producer

_TICK_SECONDS = 0.005


@click.command()
@click.option("--servers", required=True, help="Where Kafka is.")
@click.option("--topic", required=True)
@click.option("--first", type=int, required=True, help="The number of the first event; the others follow it.")
@click.option("--count", type=int, required=True)
@click.option("--rate", type=float, required=True, help="Events a second.")
def main(servers: str, topic: str, first: int, count: int, rate: float) -> None:
    """Send events to Kafka, each when it is due, and print the delay of the last event in seconds."""
    producer = Producer({"bootstrap.servers": servers, "linger.ms": 1, "acks": 1})
    started = time.monotonic()
    sent = 0
    late = 0.0
    while sent < count:
        due = min(count, int((time.monotonic() - started) * rate) + 1)
        for number in range(first + sent, first + due):
            producer.produce(topic, event(number), key=str(number))
            producer.poll(0)
        sent = due
        late = time.monotonic() - started - (sent - 1) / rate
        time.sleep(_TICK_SECONDS)
    if producer.flush(60):
        raise click.ClickException("Kafka did not take all events")
    click.echo(late)


def event(number: int) -> bytes:
    """Return an event with the current time."""
    now = time.time_ns() // 1000
    at = datetime.fromtimestamp(now / 1e6, UTC).isoformat()
    return orjson.dumps({"number": number, "at": at, "sent": now, "score": score(number)})


def score(number: int) -> float:
    """Return the value of the feature `score` in an event."""
    return number * 0.25


if __name__ == "__main__":
    main()
