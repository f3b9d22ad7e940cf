"""The signals that a process receives, as items to read from a pipe.

`signal.sigtimedwait` is not used. If the process is stopped during that call (SIGSTOP, a debugger, a frozen cgroup),
and continues (SIGCONT) only after the timeout has passed, CPython returns uninitialized memory, with an arbitrary
signal number. A pipe contains only the numbers that the signal handlers wrote.
"""

import os
import select
import signal
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from types import FrameType
from typing import Any

_READ_BYTES = 4096


class ReceivedSignals:
    """A receiver of signals, from its creation until `close`. Only the main thread may make one.

    Args:
        numbers: the signals. Their handlers are replaced until `close`.
    """

    def __init__(self, numbers: Iterable[signal.Signals]) -> None:
        self._numbers = frozenset(numbers)
        self._received: deque[signal.Signals] = deque()
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        self._wakeup_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._handlers_before: dict[signal.Signals, Any] = {
            number: signal.signal(number, _do_nothing) for number in self._numbers
        }
        self._mask_before = signal.pthread_sigmask(signal.SIG_UNBLOCK, self._numbers)

    def wait(self, seconds: float) -> signal.Signals | None:
        """Return the next signal; wait for it for up to `seconds`. Return None if no signal was received."""
        if not self._received:
            select.select([self._pipe[0]], [], [], max(0.0, seconds))
            with suppress(BlockingIOError):
                found = os.read(self._pipe[0], _READ_BYTES)
                self._received.extend(number for number in self._numbers if number in found)
        return self._received.popleft() if self._received else None

    def fork(self) -> int:
        """Fork. The child receives no signal before it has called `reset`."""
        pid = -1
        signal.pthread_sigmask(signal.SIG_BLOCK, self._numbers)
        try:
            pid = os.fork()
        finally:
            if pid:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, self._numbers)
        return pid

    def reset(self, ignored: Iterable[signal.Signals]) -> None:
        """In a child: ignore some of the signals, and restore the default action of the others."""
        signal.set_wakeup_fd(-1)
        for number in self._numbers:
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
        for end in self._pipe:
            os.close(end)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._numbers)

    def close(self) -> None:
        """Restore the signals' previous handlers."""
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask_before)
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        for end in self._pipe:
            os.close(end)


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """Do nothing: Python has written the signal's number into the pipe."""
