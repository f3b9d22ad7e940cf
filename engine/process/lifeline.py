"""The lifeline of a process's forked children: they exit when their parent is gone, and send heartbeats to it.

It has two pipes. Only the parent has the writing end of the first pipe: when that end closes, the parent is gone,
however it died. The children write their process ids into the second pipe: these are the heartbeats.
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
"""A function that sends a heartbeat to the parent."""


class Lifeline:
    """Both pipes, created before the fork. The parent uses `signs` and `close`, the children use `hold` and `beat`."""

    def __init__(self) -> None:
        self._end = os.pipe()
        self._signs = os.pipe()
        for end in self._signs:
            os.set_blocking(end, False)

    def signs(self) -> set[int]:
        """Return the process ids of the children that sent a heartbeat since the last call."""
        pids = set()
        with suppress(BlockingIOError):
            while data := os.read(self._signs[0], 4096):
                pids |= {pid for (pid,) in _PID.iter_unpack(data)}
        return pids

    def close(self) -> None:
        """Close the pipes, so that every remaining child exits."""
        for end in (*self._end, *self._signs):
            os.close(end)

    def hold(self, *, beats: bool) -> None:
        """In a child: start a thread that exits this process when the parent is gone.

        Args:
            beats: whether that thread also sends heartbeats.
        """
        os.close(self._end[1])
        os.close(self._signs[0])
        threading.Thread(target=self._hold, args=[beats], name="lifeline", daemon=True).start()

    def beat(self) -> None:
        """Send the parent a heartbeat."""
        # A full pipe has plenty of heartbeats already. A broken pipe means that the parent is gone, and the other pipe
        # shows that too. If an error ended the thread, the process would never exit and would keep the store locked.
        with suppress(BlockingIOError, BrokenPipeError):
            os.write(self._signs[1], _PID.pack(os.getpid()))

    def _hold(self, beats: bool) -> None:
        while not select.select([self._end[0]], [], [], _BEAT_SECONDS)[0]:
            if beats:
                self.beat()
        os._exit(1)
