"""Run work in threads of a separate process while a benchmark runs, and get the work's results at any time."""

import multiprocessing
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Generic, Protocol, TypeVar

Told = TypeVar("Told")
Told_co = TypeVar("Told_co", covariant=True)

_END_SECONDS = 120.0


class Work(Protocol[Told_co]):
    """The work of the process. The functions in `threads` run until the stop event is set. `take` returns the results
    since its last call. `fail` is called with the traceback of a thread that raised an exception."""

    @property
    def threads(self) -> Sequence[Callable[[], None]]: ...

    def take(self) -> Told_co: ...

    def fail(self, why: str) -> None: ...


class Beside(Generic[Told]):
    """The benchmark's handle on the process."""

    def __init__(self, other: Connection) -> None:
        self._other = other
        self._stopped = False

    def take(self) -> Told:
        """Return the results of the work since the last call."""
        self._other.send(False)
        told: Told = self._other.recv()
        return told

    def stop(self) -> Told:
        """End the work, and return the remaining results."""
        self._stopped = True
        self._other.send(True)
        told: Told = self._other.recv()
        return told

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped


@contextmanager
def beside(make: Callable[[threading.Event], Work[Told]]) -> Iterator[Beside[Told]]:
    """Run the work that `make` returns in a separate process. `make` gets the stop event. It must be a function of a
    module, so that it can be pickled."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_work, args=(make, there), daemon=True)
    process.start()
    there.close()
    running: Beside[Told] = Beside(here)
    try:
        yield running
        if not running.stopped:
            running.stop()
    finally:
        here.close()
        process.join(_END_SECONDS)
        process.kill()


def _work(make: Callable[[threading.Event], Work[Told]], other: Connection) -> None:
    stop = threading.Event()
    work = make(stop)

    def run(main: Callable[[], None]) -> None:
        try:
            main()
        except BaseException:
            work.fail(traceback.format_exc())

    threads = [threading.Thread(target=run, args=(main,), daemon=True) for main in work.threads]
    for thread in threads:
        thread.start()
    try:
        while not other.recv():
            other.send(work.take())
        stop.set()
        for thread in threads:
            thread.join(_END_SECONDS)
        other.send(work.take())
    except EOFError:
        stop.set()  # The benchmark process has died.
