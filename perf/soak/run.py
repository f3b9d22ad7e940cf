"""A server under everything at once for as long as one likes: does anything grow, fail, or answer wrongly?

A real server with two workers, and beside it lookups in all formats, gRPC, pushes, deltas, snapshots, reloads. What is
sampled on the way is judged over the last three quarters of the run: see `perf.soak.trend`. Latency and freshness are
told beside a computation of fixed size, as the machine may have changed too, and are not judged.
"""

import asyncio
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import click
import numpy as np

from engine import FeatureStore
from engine.control import WriterClient
from engine.export_root import ExportRoot
from engine.run_directory import read_server_record
from perf import servers
from perf.beside import Beside, beside
from perf.dataset import Dataset, publish_snapshot
from perf.ledger import Ledger
from perf.publishing import Published, Publisher, Rhythm
from perf.report import Finding
from perf.scale import Scale
from perf.soak.samples import roles, sample
from perf.soak.trend import trend
from perf.stores import bring_up_to_date
from perf.traffic import Load, Tally, Target, Traffic

WORKERS = 2
_WARM_UP = 0.25
_FEWEST_SAMPLES = 10
"""Of fewer no trend is judged."""
_RISES = {"MiB": 4.0, "descriptors": 2.0, "threads": 2.0, "places": 2.0}
"""What a series may rise by at least, by how its name ends or what is in it; series without are not judged."""
_UNJUDGED = ("root", "PSS")
"""Nothing of Shoal prunes a root; and PSS also changes with whatever else maps the same libraries."""


@dataclass(frozen=True)
class Plan:
    """How long, how often it is sampled, and with how many rows a view; in seconds."""

    seconds: float
    sample_seconds: float
    rows: int
    rhythm: Rhythm
    load: Load


def plan(seconds: float, rows: int = 200_000) -> Plan:
    """A run of a length: sampled at most every minute, with a snapshot every 90 s, more often in short ones."""
    rhythm = Rhythm(snapshot_seconds=min(90.0, seconds / 10), changed=rows // 100)
    return Plan(seconds, min(60.0, max(1.0, seconds / 30)), rows, rhythm, Load())


def run(scale: Scale) -> list[Finding]:
    """The case of `python -m perf`: seconds where it is only to run, minutes else; `python -m perf.soak` runs longer.

    Raises:
        AssertionError: a request failed, or was answered wrongly.
    """
    small = Plan(12.0, 2.0, 20_000, Rhythm(0.5, 4.0, 200), Load())
    with tempfile.TemporaryDirectory(prefix="soak-", dir=scale.directory) as temporary:
        findings = soak(Path(temporary), small if scale.small else plan(300.0), None)
    wrong = [finding for finding in findings if finding.unit == "requests" and finding.met is False]
    assert not wrong, wrong
    return findings


def soak(directory: Path, of: Plan, samples: TextIO | None) -> list[Finding]:
    """Run it in an empty directory; each sample is written as a line of JSON, if there is where to."""
    views = (Dataset(of.rows, 20, "docs"), Dataset(of.rows, 10, "ads"))
    root, store = ExportRoot(directory / "root"), directory / "store"
    for view, data in enumerate(views):
        publish_snapshot(root, data, files=2)
        Ledger.make(directory / f"ledger-{view}", data)
    bring_up_to_date(store, root)
    grpc_port = servers.free_port()
    log = directory / "server.log"
    with servers.shoal(store, workers=WORKERS, root=root.path, grpc_port=grpc_port, log=log) as server:
        target = Target(server.port, grpc_port, views, directory, pushed=1_000)
        with (
            beside(partial(Traffic, target, of.load)) as traffic,
            beside(partial(Publisher, target, root.path, store, of.rhythm)) as publisher,
        ):
            return Watch(store, root, of, samples, traffic, publisher).findings()


class Watch:
    """Takes samples until the time is over, and judges them."""

    def __init__(
        self,
        store: Path,
        root: ExportRoot,
        of: Plan,
        samples: TextIO | None,
        traffic: Beside[Tally],
        publisher: Beside[Published],
    ) -> None:
        self._store = store
        self._root = root
        self._plan = of
        self._lines = samples
        self._traffic = traffic
        self._publisher = publisher
        self._series: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
        self._total = Tally()
        self._published = Published()

    def findings(self) -> list[Finding]:
        """What came of it all."""
        processes = self._processes()
        reader, started = FeatureStore.open(self._store), time.monotonic()
        number = 0
        while (now := time.monotonic() - started) < self._plan.seconds:
            number += 1
            time.sleep(max(0.0, number * self._plan.sample_seconds - now))
            self._sample(time.monotonic() - started, reader)
            if number % 5 == 0:
                self._reload()
        self._add(self._traffic.stop(), self._publisher.stop())
        replaced = len(set(processes.values()) - set(self._processes().values()))
        return [*self._counts(replaced), *self._trends()]

    def _processes(self) -> Mapping[str, int]:
        record = read_server_record(self._store)
        assert record is not None
        return roles(record)

    def _reload(self) -> None:
        answer = asyncio.run(WriterClient(self._store).reload())
        self._published.troubles += [str(view["error"]) for view in answer["views"] if "error" in view]

    def _sample(self, moment: float, reader: FeatureStore) -> None:
        tally, published = self._traffic.take(), self._publisher.take()
        found = sample(self._store, self._root.path, reader)
        for kind, latencies in sorted(tally.latencies.items()):
            found[f"{kind}, p50, ms"] = 1e3 * float(np.percentile(latencies, 50))
            found[f"{kind}, p99, ms"] = 1e3 * float(np.percentile(latencies, 99))
        if published.deltas:
            found["delta published to served, p50, ms"] = 1e3 * float(np.median(published.deltas))
            found["delta published to served, most, ms"] = 1e3 * max(published.deltas)
        self._add(tally, published)
        for name, value in found.items():
            self._series[name].append((moment, value))
        if self._lines is not None:
            counts = {"failed": tally.failed, "wrong": tally.wrong, "requests": tally.requests.total()}
            line: dict[str, Any] = {"seconds": round(moment, 1), **counts, **found}
            self._lines.write(json.dumps(line) + "\n")
            self._lines.flush()
        trouble = [*tally.examples, *published.troubles]
        for what in trouble:
            click.echo(f"at {moment:.0f} s: {what}", err=True)

    def _add(self, tally: Tally, published: Published) -> None:
        self._total.requests.update(tally.requests)
        self._total.failed += tally.failed
        self._total.wrong += tally.wrong
        self._total.examples += tally.examples
        self._published.deltas += published.deltas
        self._published.snapshots += published.snapshots
        self._published.troubles += published.troubles

    @property
    def _case(self) -> str:
        return f"soak of {self._plan.seconds:,.0f} s, two views of {self._plan.rows:,} rows"

    def _counts(self, replaced: int) -> list[Finding]:
        case, total, published = self._case, self._total, self._published
        examples = {"examples": [*total.examples, *published.troubles][:20]}
        return [
            *(Finding(case, what, count, "requests") for what, count in sorted(total.requests.items())),
            Finding(case, "failed", total.failed, "requests", at_most=0, detail=examples),
            Finding(case, "answered wrongly", total.wrong, "requests", at_most=0),
            Finding(case, "publications not served, and views not reloaded", len(published.troubles), "", at_most=0),
            Finding(case, "processes that ended", replaced, "", at_most=0),
            Finding(case, "deltas, each served", len(published.deltas), ""),
            Finding(case, "snapshots, each served", len(published.snapshots), ""),
        ]

    def _trends(self) -> list[Finding]:
        warm = _WARM_UP * self._plan.seconds
        return [
            self._trend(name, [sample for sample in samples if sample[0] >= warm])
            for name, samples in self._series.items()
        ]

    def _trend(self, name: str, samples: Sequence[tuple[float, float]]) -> Finding:
        found = trend(*zip(*samples, strict=True)) if samples else trend([], [])
        what, _, unit = name.rpartition(", ") if ", " in name else (name, "", "")
        allowed = next((rise for part, rise in _RISES.items() if part in name), None)
        judged = allowed is not None and len(samples) >= _FEWEST_SAMPLES and not any(part in name for part in _UNJUDGED)
        value, at_most = found.rise, None
        if judged and allowed is not None:
            at_most = found.allowed(allowed)
            # What chance may have done is no growth, however much it is.
            value = found.rise if found.is_sure else min(found.rise, at_most)
        points = [{"x": moment, what: sampled} for moment, sampled in samples]
        return Finding(
            *(self._case, f"{what}: median {found.median:,.4g}, rises by", value, unit),
            at_most=at_most,
            detail={"points": points, "x": "seconds", "series_unit": unit, "rise": found.rise},
        )
