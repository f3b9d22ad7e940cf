"""A process that works beside a benchmark, in threads, and tells what came of it whenever it is asked."""

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
    """What such a process does: `threads` run until `stop` is set, and `take` is what came of them since it was called
    last. `fail` is told of a thread that could not go on."""

    @property
    def threads(self) -> Sequence[Callable[[], None]]: ...

    def take(self) -> Told_co: ...

    def fail(self, why: str) -> None: ...


class Beside(Generic[Told]):
    """The process as the benchmark has it."""

    def __init__(self, other: Connection) -> None:
        self._other = other
        self._stopped = False

    def take(self) -> Told:
        """What came of the work since this was called last."""
        self._other.send(False)
        told: Told = self._other.recv()
        return told

    def stop(self) -> Told:
        """End the work, and tell the rest."""
        self._stopped = True
        self._other.send(True)
        told: Told = self._other.recv()
        return told

    @property
    def stopped(self) -> bool:
        """Whether the work was told to end."""
        return self._stopped


@contextmanager
def beside(make: Callable[[threading.Event], Work[Told]]) -> Iterator[Beside[Told]]:
    """Have what `make` makes of an event to stop at, which is to be a function of a module, worked on in a process."""
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
        stop.set()  # The benchmark has died.
