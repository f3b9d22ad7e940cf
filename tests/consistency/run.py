"""A run: a real server, clients that write and read, processes killed at random, and a check of the history."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from shoal import FeatureStore
from shoal.engine.process.run_directory import read_server_record
from shoal.engine.root.export_root import ExportRoot
from shoal.loaders.backup.verify import verify_store
from tests.consistency import checker
from tests.consistency.clients import Client, Publisher, Pusher, Reader
from tests.consistency.following import Follower
from tests.consistency.history import History, Wrong, read_events
from tests.consistency.registers import KEYS, PUSHERS, VIEWS, Counts
from tests.server.serving import PATIENCE_SECONDS, Server, eventually, is_gone

WORKERS = 3
READERS = 3
DISTURBED_EVERY_SECONDS = 2.5
PLANTED_PATIENCE_SECONDS = 10.0
LEAST = 6
MOST_SECONDS_MORE = 300.0


@dataclass(frozen=True)
class Report:
    """The number of events of each kind in a run, and the violations."""

    counts: dict[str, int]
    wrongs: list[Wrong]

    def __str__(self) -> str:
        kinds = Counter(wrong.kind for wrong in self.wrongs)
        lines = [f"{number:8,} {name}" for name, number in sorted(self.counts.items())]
        lines += [f"{len(self.wrongs):8,} violations", *(f"{number:16,} {kind}" for kind, number in kinds.items())]
        examples = {wrong.kind: wrong.what for wrong in reversed(self.wrongs)}
        return "\n".join([*lines, *(f"  {kind}: {what}" for kind, what in examples.items())])


class Cluster:
    """The server of a store. Any of its processes may be killed, and a server without a supervisor is started again."""

    def __init__(self, store: Path, root: ExportRoot, counts: Counts, planted: str | None) -> None:
        self._store = store
        self._counts = counts
        self._writer = {"root": str(root)} | ({"planted": planted} if planted else {})
        self.server = self._started()

    def _started(self) -> Server:
        server = Server(self._store, self._writer, module="tests.consistency.serve", workers=WORKERS)
        return server.__enter__()

    def disturb(self, follower: "subprocess.Popen[bytes]") -> None:
        """Kill a worker, the writer or the supervisor, or stop the reading process until the next call."""
        victim = random.choices(["worker", "writer", "supervisor", "follower"], [5, 4, 2, 4])[0]
        record = read_server_record(self._store)
        follower.send_signal(signal.SIGCONT)
        if victim == "follower":
            follower.send_signal(signal.SIGSTOP)
            self._counts.add("stops of a process that reads")
        elif victim == "supervisor":
            self.server.kill()
            self._counts.add("kills of the supervisor")
            self.server = self._started()
        elif record is not None and (pids := record.workers if victim == "worker" else (record.writer,)):
            self._kill(victim, random.choice(pids))

    def _kill(self, victim: str, pid: int | None) -> None:
        # While a process is being replaced, there is no process id, or the record still names a process that has ended.
        if pid is not None and not is_gone(pid):
            os.kill(pid, signal.SIGKILL)
            self._counts.add(f"kills of a {victim}")

    def stop(self) -> None:
        self.server.__exit__()


def run(
    directory: Path, seconds: float, *, planted: str | None = None, kill: bool = True, least: Sequence[str] = ()
) -> Report:
    """Run a server and clients for a while in an empty directory, and check the history. On a slow machine, run for
    longer: until each event in `least` was counted a few times."""
    store = directory / "store"
    root = ExportRoot(directory / "root")
    counts = Counts()
    stop = threading.Event()
    paths = [directory / "history", directory / "history-in-process"]
    with History(paths[0]) as history:
        publisher = Publisher(root, history, counts, stop)
        publisher.publish_all()
        cluster = Cluster(store, root, counts, planted)
        try:
            eventually(lambda: len(_applied(cluster.server)) == len(VIEWS), "both views")
            readers = [Reader(f"reader {n}", store, history, counts, stop) for n in range(READERS)]
            pushers = [Pusher(n, store, history, counts, stop) for n in range(PUSHERS)]
            with _in_process(store, paths[1]) as follower:
                disturb = partial(cluster.disturb, follower) if kill else lambda: None
                enough = partial(counts.have, least, LEAST)
                _work([publisher, *readers, *pushers], seconds, disturb, enough)
                follower.send_signal(signal.SIGCONT)
                cluster.server.await_ready()
            unseen = _await_all(cluster.server, root, PLANTED_PATIENCE_SECONDS if planted else PATIENCE_SECONDS)
            ends = [
                Reader("reader at the end", store, history, counts, stop).read(KEYS),
                Follower("process at the end", FeatureStore.open(store), history, counts, stop).read(KEYS),
            ]
        finally:
            cluster.stop()
    events = read_events(paths)
    wrongs = checker.check(events) + unseen
    for end in ends:
        wrongs += checker.check_end(end, events.writes) if end else [Wrong("end", "there was no answer")]
    wrongs += [Wrong("store", str(checked)) for checked in verify_store(store) if checked.problem]
    wrongs += [Wrong("log", line) for line in cluster.server.log.splitlines() if "unexpected" in line]
    counts.by_name["replacements of live"] = cluster.server.log.count(" by its copy ")
    counts.by_name["reads"] = len(events.reads)
    counts.by_name["versions seen"] = len({read.version for read in events.reads})
    return Report(counts.by_name, wrongs)


@contextmanager
def _in_process(store: Path, history: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a process that reads the store directly, until the block ends."""
    command = [sys.executable, "-m", "tests.consistency.following", str(store), str(history)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        yield process
    assert process.returncode == 0


def _work(clients: list[Client], seconds: float, disturb: Callable[[], None], enough: Callable[[], bool]) -> None:
    """Let clients work for a while and until they have done enough, and disturb processes now and then. When this
    returns, all clients have finished."""
    end = time.monotonic() + seconds
    at_last = end + MOST_SECONDS_MORE
    for client in clients:
        client.start()
    try:
        while time.monotonic() < end or not (enough() or time.monotonic() > at_last):
            time.sleep(random.uniform(0, 2 * DISTURBED_EVERY_SECONDS))
            disturb()
    finally:
        for client in clients:
            client.stop.set()
    for client in clients:
        client.join()


def _await_all(server: Server, root: ExportRoot, seconds: float) -> list[Wrong]:
    """Wait until everything that was published is applied. Return a violation if this takes over `seconds`."""

    def all_applied() -> bool:
        return _applied(server) == {view: root.sequence_numbers(view)[-1] for view in VIEWS}

    try:
        eventually(all_applied, lambda: f"all that was published; the server's log is\n{server.log}", seconds)
    except AssertionError as error:
        return [Wrong("end", str(error))]
    return []


def _applied(server: Server) -> dict[str, int]:
    """Return the last applied entry by view, without views that are not loaded yet."""
    views = server.ask("GET", "/v1/status").json["views"]
    return {view["name"]: view["applied_seq"] for view in views if view.get("applied_seq")}
