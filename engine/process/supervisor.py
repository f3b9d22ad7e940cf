"""The supervisor: it starts the writer and the workers, replaces dead and silent processes, and lets workers drain.

The supervisor answers no requests and opens no store. It forks its children, so that they share imported modules and
compiled code; each child opens the store for itself. A supervisor may replace the supervisor of another server, and may
later be replaced in the same way: see `shoal.engine.process.handover`.

Signals: SIGTERM and SIGINT drain the server, and a second such signal kills the children at once. SIGHUP makes the
writer look for new publications.

`shoal.engine.process.lifeline` ties the processes together: children exit when the supervisor is gone, however it died,
and send heartbeats until then. A worker sends them from its event loop, because a worker with a hanging loop no longer
serves. The writer sends them from a thread, because one piece of its work may take long.
"""

import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from shoal.engine.base.errors import ProcessIdTaken, ReplacementFailed, ShoalError
from shoal.engine.base.failpoints import reached
from shoal.engine.process.control import writer_answers
from shoal.engine.process.handover import Inheritance, Succession, Takeover
from shoal.engine.process.lifeline import Beat, Lifeline
from shoal.engine.process.run_directory import (
    RunDirectoryKeeper,
    ServerRecord,
    has_server_record,
    remove_server_record,
    started_at,
    write_server_record,
)
from shoal.engine.process.running_clock import RunningClock
from shoal.engine.process.signals import ReceivedSignals
from shoal.engine.process.systemd import notify_systemd

log = logging.getLogger("shoal.supervisor")

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
_END = frozenset((signal.SIGTERM, signal.SIGINT))
_TICK_SECONDS = 0.25
_HANDOVER_TICK_SECONDS = 0.02
_QUICK_DEATH_SECONDS = 10.0
_FIRST_DELAY_SECONDS = 0.1
_LONGEST_DELAY_SECONDS = 30.0
_WRITER_STOP_SECONDS = 10.0
_ANOTHER_ID = 75
"""The exit code with which a child asks to be started again under another process id."""


@dataclass
class _Child:
    """The slot of one child process. When the process dies, another process gets the same slot."""

    name: str
    main: Callable[[], None]
    is_worker: bool
    pid: int | None = None
    answers: bool = False
    started: float = 0.0
    last_sign: float = 0.0
    delay: float = 0.0
    due: float = 0.0


class Supervisor:
    """The parent of a server's processes: `workers` processes that run `work(place, beat, on_trial)`, and one process
    that runs `write`, if given. `place` is the index of the worker, from 0 to workers - 1. `on_trial` tells the worker
    that another server still serves the store.

    Args:
        store: the store; the server's record goes into its run directory.
        listener: the socket on which the workers accept connections.
        inheritance: the state that this server passes to its successor.
        takeover: the takeover from the server that still serves the store; None if there is no such server.
        silent_seconds: the time in seconds after which a child without a heartbeat is killed and replaced. Time in
            which the supervisor itself did not run does not count.
        drain_seconds: the time in seconds that workers have to finish after the order to stop.
        keeper: the keeper of the store's run directory.
        refresh: a function that is called several times a second, so that a new child inherits current state.
        forget_worker: a function that is called with the process id of each worker that has ended.
    """

    def __init__(
        self,
        store: Path,
        listener: socket.socket,
        inheritance: Inheritance,
        *,
        workers: int,
        work: Callable[[int, Beat, bool], None],
        write: Callable[[], None] | None,
        takeover: Takeover | None,
        silent_seconds: float,
        drain_seconds: float,
        keeper: RunDirectoryKeeper,
        refresh: Callable[[], None],
        forget_worker: Callable[[int], None],
    ) -> None:
        self._store = store
        self._listener = listener
        self._inheritance = inheritance
        self._takeover = takeover
        self._succession: Succession | None = None
        self._gave_up_writing: float | None = None
        """The time on `_clock` at which a successor ordered this server's writer to stop; None if no successor did."""
        self._announced = False
        self.serves = False
        """Whether this server owns the store: false until its own takeover is complete, and again after a successor's
        takeover."""
        self._work = work
        self._record = ServerRecord(pid=os.getpid(), started_at=started_at(os.getpid()), address=inheritance.address)
        self._written: ServerRecord | None = None
        self._record_is_stale = False
        self._silent_seconds = silent_seconds
        self._drain_seconds = drain_seconds
        self._keeper = keeper
        self._may_mend = False
        self._refresh = refresh
        self._forget_worker = forget_worker
        self._lifeline = Lifeline()
        self._clock = RunningClock()
        self._workers = [
            _Child(f"worker {place}", partial(self._work_at, place), is_worker=True) for place in range(workers)
        ]
        self._writer = _Child("writer", write, is_worker=False) if write else None

    def run(self) -> None:
        """Supervise until a signal or a successor ends it. When this returns, no child is left.

        Raises:
            ReplacementFailed: the takeover failed; the old server keeps serving.
        """
        self._signals = ReceivedSignals(_SIGNALS)
        # Exclude the current objects from garbage collection, because they live as long as the process. If the
        # collector touched them, every child would get its own copy of their memory pages.
        gc.collect()
        gc.freeze()
        try:
            if self._takeover is None:
                self._begin_to_serve()
            try:
                while not self._tick():
                    pass
            finally:
                # The workers have already answered requests during the takeover, so they must drain even if the
                # takeover failed.
                self._drain()
        finally:
            self._kill(self._children)
            if self.serves:
                remove_server_record(self._store)
            for ties in (self._takeover, self._succession):
                if ties is not None:
                    ties.close()
            self._lifeline.close()
            gc.unfreeze()
            self._signals.close()

    @property
    def _children(self) -> list[_Child]:
        return [*self._workers, *([self._writer] if self._writer else [])]

    # --- while it serves -------------------------------------------------------------------------------------

    def _tick(self) -> bool:
        """Do the work that is due, then wait briefly for a signal; return whether it is time to stop."""
        self._reap(replace=True)
        self._kill_silent()
        self._announce_once()
        self._refresh()
        self._may_mend = self._keeper.mend()
        self._take_over()
        if self._check_successor():
            return True
        self._start_due()
        if self.serves:
            self._write_record()
        return self._wait_for_signal()

    def _announce_once(self) -> None:
        """Tell systemd, once, that all workers answer."""
        if not self._announced and all(child.answers for child in self._workers):
            self._announced = True
            notify_systemd("READY=1")

    def _start_due(self) -> None:
        """Start the children that should run now and do not run."""
        for child in self._children:
            if child.pid is None and child.due <= self._clock.now() and (child.is_worker or self._may_write):
                self._start(child)

    def _wait_for_signal(self) -> bool:
        """Wait for a signal until the next tick; return whether the signal ends the server."""
        hands_over = self._takeover is not None or (self._succession is not None and self._succession.has_successor)
        received = self._signals.wait(_HANDOVER_TICK_SECONDS if hands_over else _TICK_SECONDS)
        if received == signal.SIGHUP:
            self._forward_reload()
        if received not in _END:
            return False
        log.info("%s: draining for up to %g s", received.name, self._drain_seconds)
        return True

    def _start(self, child: _Child) -> None:
        child.answers = False
        child.started = child.last_sign = self._clock.now()
        try:
            child.pid = self._fork(child)
            reached("server.forked")
        except OSError as error:
            child.due = child.started + _LONGEST_DELAY_SECONDS
            log.error("%s cannot be started: %s; again in %g s", child.name, error, _LONGEST_DELAY_SECONDS)
        else:
            log.info("%s started, pid %d", child.name, child.pid)

    def _reap(self, *, replace: bool) -> None:
        """Find the children that have ended, and schedule their replacements."""
        running = {child.pid: child for child in self._children if child.pid is not None}
        for pid, status in _ended():
            child = running.get(pid)
            if child is None:
                continue
            child.pid = None
            if child.is_worker:
                self._forget_worker(pid)
            if not replace:
                continue
            if child is self._writer and self._gave_up_writing is not None:
                log.info("%s, pid %d, has stopped; the new server starts its own writer", child.name, pid)
                continue
            now = self._clock.now()
            code = os.waitstatus_to_exitcode(status)
            if code == _ANOTHER_ID:
                child.due = now
                continue
            if self._takeover is not None:
                raise ReplacementFailed(
                    f"{child.name} of the new server {_manner_of_death(code)}; the old server continues to serve"
                )
            quick = now - child.started < _QUICK_DEATH_SECONDS
            child.delay = min(max(2 * child.delay, _FIRST_DELAY_SECONDS), _LONGEST_DELAY_SECONDS) if quick else 0.0
            child.due = now + child.delay
            log.error("%s, pid %d, %s; it is replaced in %.1f s", child.name, pid, _manner_of_death(code), child.delay)

    def _kill_silent(self) -> None:
        signs = self._lifeline.signs()
        now = self._clock.now()
        for child in self._children:
            if child.pid in signs:
                child.answers = True
                child.last_sign = now
            elif child.pid is not None and now - child.last_sign > self._silent_seconds:
                log.error("%s, pid %d, gave no sign of life for %g s", child.name, child.pid, self._silent_seconds)
                os.kill(child.pid, signal.SIGKILL)

    def _forward_reload(self) -> None:
        if self._writer is None or self._writer.pid is None:
            log.warning("SIGHUP: there is no writer process to reload")
        else:
            os.kill(self._writer.pid, signal.SIGHUP)

    def _write_record(self) -> None:
        record = self._record.model_copy(
            update={
                "workers": tuple(child.pid for child in self._workers if child.pid is not None),
                "writer": self._writer.pid if self._writer else None,
            }
        )
        if record == self._written and (has_server_record(self._store) or not self._may_mend):
            return
        try:
            write_server_record(self._store, record)
        except OSError as error:
            # Readers see an old record until the disk has room again.
            if not self._record_is_stale:
                log.error("the server's record cannot be written: %s; the supervisor keeps trying", error)
            self._record_is_stale = True
        else:
            self._written = record
            self._record_is_stale = False

    # --- from one server to the next -----------------------------------------------------------------------------

    @property
    def _may_write(self) -> bool:
        return self._gave_up_writing is None and (self._takeover is None or self._takeover.may_write)

    def _begin_to_serve(self) -> None:
        self.serves = True
        self._await_successor()

    def _await_successor(self) -> None:
        self._succession = None
        try:
            self._succession = Succession(self._store, self._inheritance)
        except OSError as error:
            log.error("the handover socket cannot be made, so no other server can replace this one: %s", error)

    def _take_over(self) -> None:
        """Continue this server's takeover, if one is under way."""
        if self._takeover is None:
            return
        workers_answer = all(child.answers for child in self._workers)
        if self._takeover.is_over(workers_answer=workers_answer, writer_answers=lambda: writer_answers(self._store)):
            self._takeover.close()
            self._takeover = None
            self._begin_to_serve()
            log.info("the takeover is complete: this server has replaced the old one")

    def _check_successor(self) -> bool:
        """Carry out a successor's orders; return whether the successor has taken over."""
        if self._succession is None:
            return False
        if self._may_mend and not self._succession.has_successor and not self._succession.is_in_place():
            self._succession.close()
            self._await_successor()
        order = self._succession.poll()
        if order == "leave":
            log.info("another server has taken over: draining for up to %g s", self._drain_seconds)
            self.serves = False
            return True
        if order == "writer":
            self._gave_up_writing = self._clock.now()
            if self._writer is not None and self._writer.pid is not None:
                self._signal(self._writer, signal.SIGTERM)
        if self._gave_up_writing is None:
            return False
        if not self._succession.has_successor:
            log.error("the new server has gone before it took over; this server continues to serve")
            self._gave_up_writing = None
        elif self._writer is None or self._writer.pid is None:
            self._succession.confirm_writer()
        elif self._clock.now() > self._gave_up_writing + _WRITER_STOP_SECONDS:
            self._kill([self._writer])
        return False

    # --- at the end ------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        """Let the workers finish their requests; then stop the writer, which the workers may need until then."""
        notify_systemd("STOPPING=1")
        self._listener.close()
        if self._takeover is not None:
            # The requests that wait in the workers need a writer. End this server's writer, so that the old server
            # starts its own writer again.
            self._kill([self._writer] if self._writer is not None else [])
            self._takeover.close()
        if self._stop(self._workers, self._drain_seconds) and self._writer:
            self._stop([self._writer], _WRITER_STOP_SECONDS)

    def _stop(self, children: Iterable[_Child], seconds: float) -> bool:
        """Ask children to end, and kill those that do not end in time; return False if a signal cut the wait short."""
        children = [child for child in children if child.pid is not None]
        for child in children:
            self._signal(child, signal.SIGTERM)
        deadline = self._clock.now() + seconds
        while any(child.pid for child in children):
            left = deadline - self._clock.now()
            if left <= 0:
                names = ", ".join(child.name for child in children if child.pid)
                log.error("%s did not stop in %g s", names, seconds)
                self._kill(children)
                break
            received = self._signals.wait(min(left, _TICK_SECONDS))
            if received in _END:
                log.warning("%s again: ending at once", received.name)
                return False
            self._reap(replace=False)
        return True

    def _kill(self, children: Iterable[_Child]) -> None:
        for child in children:
            if child.pid is not None:
                self._signal(child, signal.SIGKILL)
                os.waitpid(child.pid, 0)
                child.pid = None

    @staticmethod
    def _signal(child: _Child, number: signal.Signals) -> None:
        assert child.pid is not None
        os.kill(child.pid, number)

    # --- in the child ----------------------------------------------------------------------------------------

    def _fork(self, child: _Child) -> int:
        _flush()
        pid = self._signals.fork()
        if pid:
            return pid
        code = 1
        try:
            self._run_child(child)
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except ProcessIdTaken as error:
            log.warning("%s is started again under another process id: %s", child.name, error)
            code = _ANOTHER_ID
        except ShoalError as error:
            log.error("%s cannot go on: %s: %s", child.name, type(error).__name__, error)
        except BaseException:
            log.exception("%s cannot go on", child.name)
        finally:
            _flush()
            # The child must not run the supervisor's exit handlers.
            os._exit(code)

    def _run_child(self, child: _Child) -> None:
        # A terminal sends SIGINT to the whole process group, but only the supervisor decides when a child stops.
        self._signals.reset(ignored=(signal.SIGINT, signal.SIGHUP))
        if self._succession is not None:
            self._succession.close()
        if self._takeover is not None:
            self._takeover.close()
        if not child.is_worker:
            # While the writer has the listening socket open, the address accepts connections, even without workers.
            self._listener.close()
        self._lifeline.hold(beats=not child.is_worker)
        child.main()

    def _work_at(self, place: int) -> None:
        self._work(place, self._lifeline.beat, self._takeover is not None)


def _flush() -> None:
    """Flush stdout and stderr; ignore errors, such as a reader that has closed its pipe."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()


def _ended() -> Iterator[tuple[int, int]]:
    """Reap each child that ended, and yield its id and status. As process 1 of a container, also reap orphans."""
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            yield ended


def _manner_of_death(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
