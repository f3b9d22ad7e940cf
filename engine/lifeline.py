"""What ties children to the process that forked them: they end when it does, however it died, and give signs of life.

Two pipes. Only the parent has the writing end of the first: when that closes, it is gone. Into the second the children
write their process ids.
"""

import os
import select
import struct
import threading
from collections.abc import Callable
from contextlib import suppress

_BEAT_SECONDS = 1.0
_PID = struct.Struct("=i")

Beat = Callable[[], None]
"""Gives the parent a sign of life."""


class Lifeline:
    """Made before the fork; `signs` and `close` are for the parent, `hold` and `beat` for its children."""

    def __init__(self) -> None:
        self._end = os.pipe()
        self._signs = os.pipe()
        for end in self._signs:
            os.set_blocking(end, False)

    def signs(self) -> set[int]:
        """The process ids of the children that gave a sign of life since they were last asked for."""
        pids = set()
        with suppress(BlockingIOError):
            while data := os.read(self._signs[0], 4096):
                pids |= {pid for (pid,) in _PID.iter_unpack(data)}
        return pids

    def close(self) -> None:
        """Have every child end that is left."""
        for end in (*self._end, *self._signs):
            os.close(end)

    def hold(self, *, beats: bool) -> None:
        """In a child: end with the parent, from now on; and give signs of life until then, if this is to."""
        os.close(self._end[1])
        os.close(self._signs[0])
        threading.Thread(target=self._hold, args=[beats], name="lifeline", daemon=True).start()

    def beat(self) -> None:
        """Give the parent a sign of life."""
        # A full pipe has plenty of signs already. And whoever reads them may be gone, which the other pipe tells: a
        # thread that died of it would leave a process that never ends, and has the store locked.
        with suppress(BlockingIOError, BrokenPipeError):
            os.write(self._signs[1], _PID.pack(os.getpid()))

    def _hold(self, beats: bool) -> None:
        while not select.select([self._end[0]], [], [], _BEAT_SECONDS)[0]:
            if beats:
                self.beat()
        os._exit(1)
