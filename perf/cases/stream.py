"""The time from sending an event to Kafka until every worker serves it. `shoal stream` delivers the events as pushes,
and then as deltas, at rising rates.

Each event contains the time when it was sent, and has its own key, so that the reader must find every event.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import yaml

from perf import servers
from perf.events import score
from perf.report import Finding
from perf.scale import Scale
from shoal import FeatureStore
from shoal.engine.root.export_root import ExportRoot
from shoal.spark_export.stream.log import publish_definition
from shoal.spark_export.views.definition import load_views
from tests import kafka

RATES = (10, 100, 1_000, 5_000, 10_000)
SMALL_RATES = (100,)
WORKERS = 2
PARTITIONS = 2
MASTER = "local[2]"
VIEW = "events"

_WARMING = (20, 2_000)
"""The numbers of events in the runs before the measurement. These runs warm up Spark, which compiles its queries."""
_MOST_ASKED = 20_000
_LOOK_SECONDS = 0.002
_PATIENCE_SECONDS = 120.0


def run(scale: Scale) -> list[Finding]:
    """Measure both ways, each with its own server, stream and topic."""
    findings = []
    with kafka.broker() as address:
        for way in ("pushes", "deltas"):
            with tempfile.TemporaryDirectory(prefix="stream-", dir=scale.directory) as temporary:
                findings += _measure(Path(temporary), address, way, scale)
    return findings


def _measure(workspace: Path, address: str, way: str, scale: Scale) -> list[Finding]:
    kafka.create_topic(address, way, PARTITIONS)
    _define(workspace / "views.yaml", address, way)
    root = ExportRoot(workspace / "root")
    publish_definition(load_views(workspace / "views.yaml").views[0], root, "perf")
    findings = []
    points = []
    first = 0
    with servers.shoal(workspace / "store", workers=WORKERS, root=root.path) as server:
        to = ["--push-to", f"http://127.0.0.1:{server.port}"] if way == "pushes" else ["--to", str(root.path)]
        with _streaming(workspace, to):
            reader = FeatureStore.open(workspace / "store")
            for count in _WARMING[:1] if scale.small else _WARMING:
                _send(reader, address, way, first, count, count / 5)
                first += count
            for rate in SMALL_RATES if scale.small else RATES:
                count = rate * (3 if scale.small else 20)
                seconds = _send(reader, address, way, first, count, rate)
                first += count
                p50, p95 = (float(np.percentile(seconds, share)) for share in (50, 95))
                case = f"{way} of a stream, {rate:,} events a second"
                findings += [
                    Finding(case, "sent to served, p50", p50, "s"),
                    Finding(case, "sent to served, p95", p95, "s", at_most=5.0 if rate <= 1_000 else None),
                ]
                points.append({"x": rate, "p50": p50, "p95": p95})
    curve = {"x": "events a second", "unit": "seconds", "points": points}
    return [*findings, Finding(f"{way} of a stream", "rates measured", len(points), "rates", detail=curve)]


def _define(path: Path, address: str, topic: str) -> None:
    options = {"kafka.bootstrap.servers": address, "subscribe": topic, "startingOffsets": "earliest"}
    view = {
        "name": VIEW,
        "join_keys": [{"name": "number", "type": "int64"}],
        "features": [{"name": "sent", "type": "int64"}, {"name": "score", "type": "float64"}],
        "timestamp_field": "at",
        "stream": {
            "format": "kafka",
            "options": options,
            "columns": "number BIGINT, at TIMESTAMP, sent BIGINT, score DOUBLE",
        },
    }
    path.write_text(yaml.safe_dump({"views": [view]}))


@contextmanager
def _streaming(workspace: Path, to: Sequence[str]) -> Iterator[None]:
    command = [sys.executable, "-m", "shoal", "stream", "--views", str(workspace / "views.yaml"), *to]
    command += ["--checkpoint", str(workspace / "checkpoint"), "--master", MASTER, "--package", kafka.CONNECTOR]
    command += ["--every", "0"]
    with (workspace / "stream.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            yield
        except BaseException:
            print((workspace / "stream.log").read_text()[-3000:], file=sys.stderr)
            raise
        finally:
            process.terminate()
            process.wait()


def _send(
    reader: FeatureStore, address: str, topic: str, first: int, count: int, rate: float
) -> npt.NDArray[np.float64]:
    """Send events, and wait until all are served. Return the seconds from sending to serving for each event.

    Raises:
        AssertionError: an event is served with a value other than the sent value, or is not served at all.
    """
    command = [sys.executable, "-m", "perf.events", "--servers", address, "--topic", topic]
    command += ["--first", str(first), "--count", str(count), "--rate", str(rate)]
    waited = np.arange(first, first + count)
    found: list[npt.NDArray[np.float64]] = []
    seen = -1
    moved = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as sender:
        while waited.size:
            version = reader.version().id
            if version == seen:
                if time.monotonic() > moved + _PATIENCE_SECONDS:
                    sender.kill()
                    raise AssertionError(f"{waited.size} events are not served, such as {waited[0]}")
                time.sleep(_LOOK_SECONDS)
                continue
            seen = version
            moved = time.monotonic()
            asked = waited[:_MOST_ASKED]
            answer = reader.lookup([f"{VIEW}:sent", f"{VIEW}:score"], {"number": asked}).to_arrow()
            now = time.time_ns() // 1000
            is_served = answer[f"{VIEW}:sent"].is_valid().to_numpy(zero_copy_only=False)
            served = answer.filter(answer[f"{VIEW}:sent"].is_valid())
            expected = np.array([score(number) for number in asked[is_served].tolist()])
            if not np.array_equal(served[f"{VIEW}:score"].to_numpy(), expected):
                raise AssertionError("an event is served with another value than it was sent with")
            found.append((now - served[f"{VIEW}:sent"].to_numpy()) / 1e6)
            waited = np.concatenate([asked[~is_served], waited[_MOST_ASKED:]])
            if is_served.all():
                seen = -1
        if sender.wait():
            raise AssertionError("the events could not be sent")
    return np.concatenate(found)
