"""Replace a server by another on the same store, again and again, under load: the number of failed requests, and the
slowest request. In between, start releases that fail to start: the old server must continue."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from shutil import copytree
from statistics import median

from perf import servers
from perf.beside import beside
from perf.dataset import Dataset, publish_snapshot
from perf.ledger import Ledger
from perf.report import Finding
from perf.scale import Scale
from perf.stores import bring_up_to_date
from perf.traffic import Load, Tally, Target, Traffic
from shoal.engine.process.run_directory import read_server_record
from shoal.engine.root.export_root import ExportRoot

WORKERS = 2
TIMES = 20
_CODE = Path(__file__).parents[2]
_PATIENCE_SECONDS = 120.0
_LOAD = Load(kept_rate=160.0, fresh_rate=80.0, grpc_rate=20.0, push_rate=20.0, scrape_rate=1.0)


def run(scale: Scale) -> list[Finding]:
    """Start two releases in turn, and after each pair of starts a release that fails. One of the two is a copy of the
    code.

    Raises:
        AssertionError: a request failed, or was answered wrongly.
    """
    times, rows = (2, 20_000) if scale.small else (TIMES, 200_000)
    views = (Dataset(rows, 20, "docs"), Dataset(rows, 10, "ads"))
    with tempfile.TemporaryDirectory(prefix="rollout-", dir=scale.directory) as temporary:
        directory = Path(temporary)
        root = ExportRoot(directory / "root")
        store = directory / "store"
        for view, data in enumerate(views):
            publish_snapshot(root, data, files=1)
            Ledger.make(directory / f"ledger-{view}", data)
        bring_up_to_date(store, root)
        target = Target(servers.free_port(), servers.free_port(), views, directory, pushed=1_000)
        line = _Line(directory, target, root)
        try:
            line.replace(_CODE)
            _await(target.is_ready, "a server that is ready")
            with beside(partial(Traffic, target, _LOAD)) as traffic:
                time.sleep(2.0)
                idle = traffic.take()
                seconds = []
                for number in range(times):
                    seconds.append(line.replace(line.copy if number % 2 == 0 else _CODE))
                    if number % 2:
                        line.fail()
                during = traffic.stop()
        finally:
            line.stop()
    findings = _findings(times, seconds, idle, during)
    wrong = [finding for finding in findings if finding.unit == "requests" and finding.met is False]
    assert not wrong, (wrong, during.examples)
    return findings


class _Line:
    """The successive servers of one store. Each server replaces the one before it."""

    def __init__(self, directory: Path, target: Target, root: ExportRoot) -> None:
        self._directory = directory
        self._target = target
        self._root = root
        self._store = directory / "store"
        self._running: subprocess.Popen[bytes] | None = None
        self.copy = directory / "release"
        self._broken = directory / "broken"
        for release in (self.copy, self._broken):
            # The copy includes the compiled kernels, because compiling them would take minutes.
            copytree(_CODE / "shoal", release / "shoal")
        worker = self._broken / "shoal" / "engine" / "server" / "worker.py"
        worker.write_text(
            worker.read_text().replace("        keep_freed_memory()\n", "        raise SystemExit('broken')\n")
        )

    def replace(self, release: Path) -> float:
        """Start a release that takes over from the old server. Return the seconds until the old server has ended."""
        started = time.monotonic()
        before = self._running
        self._running = self._start(release)
        _await(self._serves, f"the server of {release}")
        if before is not None:
            assert before.wait(_PATIENCE_SECONDS) == 0
        return time.monotonic() - started

    def fail(self) -> None:
        """Start a release that fails to start, and check that the old server continues."""
        assert self._start(self._broken).wait(_PATIENCE_SECONDS) == 1
        assert self._serves()

    def stop(self) -> None:
        """Stop the running server."""
        if self._running is not None:
            self._running.terminate()
            self._running.wait(_PATIENCE_SECONDS)

    def _start(self, release: Path) -> "subprocess.Popen[bytes]":
        target = self._target
        command: list[object] = [
            sys.executable,
            "-m",
            "shoal",
            "serve",
            "--replace",
            "--store",
            self._store,
            "--from",
            self._root,
        ]
        # The timeout is long, so that late answers are measured and not rejected.
        command += ["--request-timeout-ms", 60_000]
        command += ["--port", target.port, "--grpc-port", target.grpc_port, "--workers", WORKERS]
        environment = {"PYTHONPATH": str(release), "PATH": "/usr/bin:/bin"}
        with (self._directory / "server.log").open("ab") as log:
            return subprocess.Popen([*map(str, command)], cwd=release, env=environment, stdout=log, stderr=log)

    def _serves(self) -> bool:
        record = read_server_record(self._store)
        return record is not None and self._running is not None and record.pid == self._running.pid


def _await(look: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not look():
        assert time.monotonic() < deadline, f"not seen in {_PATIENCE_SECONDS:g} s: {what}"
        time.sleep(0.02)


def _findings(times: int, seconds: Sequence[float], idle: Tally, during: Tally) -> list[Finding]:
    case = f"server replaced {times} times under load"
    findings = [
        Finding(case, "requests", during.requests.total(), ""),
        Finding(case, "failed", during.failed, "requests", at_most=0, detail={"examples": during.examples}),
        Finding(case, "answered wrongly", during.wrong, "requests", at_most=0),
        Finding(case, "from the order until the old server is gone", median(seconds), "s"),
    ]
    for kind, latencies in sorted(during.latencies.items()):
        findings.append(Finding(case, f"{kind}: slowest before", 1e3 * max(idle.latencies.get(kind, [0.0])), "ms"))
        findings.append(Finding(case, f"{kind}: slowest", 1e3 * max(latencies), "ms"))
    return findings
