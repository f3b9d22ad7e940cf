"""Idle stores move on too: a version that is held keeps the pages from being used again that later commits replaced, so
that the store on the disk would grow for as long as a notebook that opened it is left alone."""

import threading
import time
from contextlib import suppress
from typing import Any, Protocol
from weakref import WeakSet

from engine.errors import ShoalError

_SECONDS = 5.0


class Moving(Protocol):
    """What has a newest version."""

    def version(self) -> Any:
        """Take it over, if that has not been done."""


_stores: WeakSet[Moving] = WeakSet()
_starting = threading.Lock()
_thread: threading.Thread | None = None


def keep_up(store: Moving) -> None:
    """Have a store move on to its newest version every few seconds, for as long as it is there. One thread of the
    process does that for all, and one begun before a fork is begun anew after it."""
    global _thread
    with _starting:
        _stores.add(store)
        if _thread is None or not _thread.is_alive():
            _thread = threading.Thread(target=_run, name="shoal-keep-up", daemon=True)
            _thread.start()


def leave_alone(store: Moving) -> None:
    """Stop updating a store, because it was closed."""
    with _starting:
        _stores.discard(store)


def _run() -> None:
    while True:
        time.sleep(_SECONDS)
        with _starting:
            stores = list(_stores)
        while stores:
            # A store that cannot be read now is tried again; its lookups say what is wrong.
            with suppress(ShoalError):
                stores.pop().version()
