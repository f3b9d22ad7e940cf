"""The supervisor: starts the writer and the workers, replaces those that die or fall silent, and lets them drain.

It serves nothing and opens no store. Children are forked, so that they share what was imported and compiled; each opens
the store for itself. It may take the place of another supervisor, and leave its own to a third: see `engine.handover`.

Signals: SIGTERM and SIGINT drain (a second one ends all at once), SIGHUP makes the writer look for news.

`engine.lifeline` ties the processes together: children end with the supervisor, however it died, and give signs of life
until then: a worker from its event loop, for it serves no more if that hangs; the writer from a thread, as it may be
long about its work.
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

from engine.control import writer_answers
from engine.errors import ProcessIdTaken, ReplacementFailed, ShoalError
from engine.failpoints import reached
from engine.handover import Inheritance, Succession, Takeover
from engine.lifeline import Beat, Lifeline
from engine.notify import notify
from engine.run_directory import (
    RunDirectoryKeeper,
    ServerRecord,
    has_server_record,
    remove_server_record,
    started_at,
    write_server_record,
)
from engine.running_clock import RunningClock
from engine.signals import ReceivedSignals

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
    """A place for one process, which different processes fill one after the other."""

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
    """Runs `workers` processes of `work(place, beat, on_trial)`, place 0 … workers - 1, and one of `write`, if given.
    A worker is on trial while another server serves the store.

    Args:
        store: the store whose run directory gets the server's record.
        listener: the socket that the workers accept from.
        inheritance: what a server gets that takes the place of this one.
        takeover: how this one takes another's, which serves the store still.
        silent_seconds: after how many seconds without a sign of life a child is killed and replaced. Time in which the
            supervisor itself did not run does not count.
        drain_seconds: how long workers may go on once they were told to stop.
        keeper: looks after the store's run directory.
        refresh: called several times a second, so that a new child inherits current state.
        bury: called with the process id of every worker that has ended.
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
        bury: Callable[[int], None],
    ) -> None:
        self._store = store
        self._listener = listener
        self._inheritance = inheritance
        self._takeover = takeover
        self._succession: Succession | None = None
        self._gave_up_writing: float | None = None
        """When a successor asked for it."""
        self._announced = False
        self.serves = False
        """Whether the store is this server's: it is another's before a takeover is over, and once a successor came."""
        self._work = work
        self._record = ServerRecord(pid=os.getpid(), started_at=started_at(os.getpid()), address=inheritance.address)
        self._written: ServerRecord | None = None
        self._record_is_stale = False
        self._silent_seconds = silent_seconds
        self._drain_seconds = drain_seconds
        self._keeper = keeper
        self._may_mend = False
        self._refresh = refresh
        self._bury = bury
        self._lifeline = Lifeline()
        self._clock = RunningClock()
        self._workers = [
            _Child(f"worker {place}", partial(self._work_at, place), is_worker=True) for place in range(workers)
        ]
        self._writer = _Child("writer", write, is_worker=False) if write else None

    def run(self) -> None:
        """Supervise until told to stop; then every child is gone.

        Raises:
            ReplacementFailed: the server whose place this one was to take goes on.
        """
        self._signals = ReceivedSignals(_SIGNALS)
        # What is there now stays for ever: the collector would only make every child copy its pages.
        gc.collect()
        gc.freeze()
        try:
            if self._takeover is None:
                self._begin_to_serve()
            try:
                while not self._tick():
                    pass
            finally:
                # Workers on trial have answered requests already.
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
        """Set right what is not, then wait a little for a signal; returns whether it is time to stop."""
        self._reap(replace=True)
        self._kill_silent()
        if not self._announced and all(child.answers for child in self._workers):
            self._announced = True
            notify("READY=1")
        self._refresh()
        self._may_mend = self._keeper.mend()
        self._take_over()
        if self._heed_successor():
            return True
        for child in self._children:
            if child.pid is None and child.due <= self._clock.now() and (child.is_worker or self._may_write):
                self._start(child)
        if self.serves:
            self._write_record()
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
        """Notice which children are gone, and when their successors are due."""
        running = {child.pid: child for child in self._children if child.pid is not None}
        for pid, status in _ended():
            child = running.get(pid)
            if child is None:
                continue
            child.pid = None
            if child.is_worker:
                self._bury(pid)
            if not replace:
                continue
            if child is self._writer and self._gave_up_writing is not None:
                log.info("%s, pid %d, has stopped for the next server's", child.name, pid)
                continue
            now, code = self._clock.now(), os.waitstatus_to_exitcode(status)
            if code == _ANOTHER_ID:
                child.due = now
                continue
            if self._takeover is not None:
                raise ReplacementFailed(
                    f"{child.name} of the new server {_manner_of_death(code)}; the server that was to be replaced "
                    f"goes on"
                )
            quick = now - child.started < _QUICK_DEATH_SECONDS
            child.delay = min(max(2 * child.delay, _FIRST_DELAY_SECONDS), _LONGEST_DELAY_SECONDS) if quick else 0.0
            child.due = now + child.delay
            log.error("%s, pid %d, %s; it is replaced in %.1f s", child.name, pid, _manner_of_death(code), child.delay)

    def _kill_silent(self) -> None:
        signs, now = self._lifeline.signs(), self._clock.now()
        for child in self._children:
            if child.pid in signs:
                child.answers, child.last_sign = True, now
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
            # Whoever reads it misses what is new until there is room again.
            if not self._record_is_stale:
                log.error("the server's record cannot be written: %s; it is tried again and again", error)
            self._record_is_stale = True
        else:
            self._written, self._record_is_stale = record, False

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
            log.error("no other server will be able to take the place of this one: %s", error)

    def _take_over(self) -> None:
        """Go on with taking another server's place, if that is what happens."""
        if self._takeover is None:
            return
        workers_answer = all(child.answers for child in self._workers)
        if self._takeover.is_over(workers_answer=workers_answer, writer_answers=lambda: writer_answers(self._store)):
            self._takeover.close()
            self._takeover = None
            self._begin_to_serve()
            log.info("took over")

    def _heed_successor(self) -> bool:
        """Do as a successor orders; returns whether it has taken over."""
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
            log.error("the server that was to take over has gone; this one goes on")
            self._gave_up_writing = None
        elif self._writer is None or self._writer.pid is None:
            self._succession.confirm_writer()
        elif self._clock.now() > self._gave_up_writing + _WRITER_STOP_SECONDS:
            self._kill([self._writer])
        return False

    # --- at the end ------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        """Workers finish what is under way; then the writer, which they may still need, stops too."""
        notify("STOPPING=1")
        self._listener.close()
        if self._takeover is not None:
            # The old server's writer is to be back for what waits in the workers.
            self._kill([self._writer] if self._writer is not None else [])
            self._takeover.close()
        if self._stop(self._workers, self._drain_seconds) and self._writer:
            self._stop([self._writer], _WRITER_STOP_SECONDS)

    def _stop(self, children: Iterable[_Child], seconds: float) -> bool:
        """Ask children to end, and kill those that did not in time; returns False if a signal cut that short."""
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
            self._become(child)
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
            # What else the supervisor would do at its exit is none of the child's business.
            os._exit(code)

    def _become(self, child: _Child) -> None:
        # A terminal sends SIGINT to the whole group; whether and when to stop is for the supervisor to say.
        self._signals.reset(ignored=(signal.SIGINT, signal.SIGHUP))
        if self._succession is not None:
            self._succession.close()
        if self._takeover is not None:
            self._takeover.close()
        if not child.is_worker:
            # The address would seem to be served for as long as the writer has it open.
            self._listener.close()
        self._lifeline.hold(beats=not child.is_worker)
        child.main()

    def _work_at(self, place: int) -> None:
        self._work(place, self._lifeline.beat, self._takeover is not None)


def _flush() -> None:
    """Flush stdout and the log; ignore errors of their readers."""
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
