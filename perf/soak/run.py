"""Put a server under all kinds of load at once for a given time: does anything grow, fail, or answer wrongly?

A real server with two workers gets lookups in all formats, gRPC, pushes, deltas, snapshots and reloads. The samples of
the last three quarters of the run are judged: see `perf.soak.trend`. Latency and freshness are reported but not judged.
The time of a fixed computation is reported with them, because the speed of the machine may have changed too.
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
from shoal import FeatureStore
from shoal.engine.process.control import WriterClient
from shoal.engine.process.run_directory import read_server_record
from shoal.engine.root.export_root import ExportRoot

WORKERS = 2
_WARM_UP = 0.25
_FEWEST_SAMPLES = 10
"""The least number of samples for judging a trend."""
_RISES = {"MiB": 4.0, "descriptors": 2.0, "threads": 2.0, "places": 2.0}
"""A part of a series' name → the rise that is always allowed. A series is judged only if its name has such a part."""
_UNJUDGED = ("root", "PSS")
"""Parts of names of series that are not judged. Shoal does not prune a root, and PSS also changes when other processes
map the same libraries."""


@dataclass(frozen=True)
class Plan:
    """The plan of a run: its length and the interval between samples in seconds, and the number of rows per view."""

    seconds: float
    sample_seconds: float
    rows: int
    rhythm: Rhythm
    load: Load


def plan(seconds: float, rows: int = 200_000) -> Plan:
    """Return the plan for a run of some seconds. A long run has a sample every minute and a snapshot every 90 s; a
    short run has both more often."""
    rhythm = Rhythm(snapshot_seconds=min(90.0, seconds / 10), changed=rows // 100)
    return Plan(seconds, min(60.0, max(1.0, seconds / 30)), rows, rhythm, Load())


def run(scale: Scale) -> list[Finding]:
    """Run the soak as a case of `python -m perf`: for some seconds with `--small`, otherwise for some minutes.
    `python -m perf.soak` runs longer.

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
    """Run a soak in an empty directory. If `samples` is given, write each sample to it as a line of JSON."""
    views = (Dataset(of.rows, 20, "docs"), Dataset(of.rows, 10, "ads"))
    root = ExportRoot(directory / "root")
    store = directory / "store"
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
    """Takes samples of a soak until its time is over, and judges them."""

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
        """Take samples until the time is over, and return the findings."""
        processes = self._processes()
        reader = FeatureStore.open(self._store)
        started = time.monotonic()
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
        tally = self._traffic.take()
        published = self._publisher.take()
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
        case = self._case
        total = self._total
        published = self._published
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
        value = found.rise
        at_most = None
        if judged and allowed is not None:
            at_most = found.allowed(allowed)
            # A rise that may be due to chance is not growth, however large it is.
            value = found.rise if found.is_sure else min(found.rise, at_most)
        points = [{"x": moment, what: sampled} for moment, sampled in samples]
        return Finding(
            *(self._case, f"{what}: median {found.median:,.4g}, rises by", value, unit),
            at_most=at_most,
            detail={"points": points, "x": "seconds", "series_unit": unit, "rise": found.rise},
        )
