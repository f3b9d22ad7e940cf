"""Refresh idle stores in the background. While a process holds a version, LMDB cannot reuse the pages that later
commits replaced. Without a refresh, an idle notebook with an open store would make the store on the disk grow."""

import threading
import time
from contextlib import suppress
from typing import Any, Protocol
from weakref import WeakSet

from shoal.engine.base.errors import ShoalError

_SECONDS = 5.0


class Refreshable(Protocol):
    """An object with a newest version."""

    def version(self) -> Any:
        """Switch to the newest version, unless the object has this version already."""


_stores: WeakSet[Refreshable] = WeakSet()
_starting = threading.Lock()
_thread: threading.Thread | None = None


def refresh_in_background(store: Refreshable) -> None:
    """Switch a store to its newest version every few seconds, until the store is garbage-collected. One thread does
    this for all stores of the process. If the process forks, the next call in the child starts a new thread."""
    global _thread
    with _starting:
        _stores.add(store)
        if _thread is None or not _thread.is_alive():
            _thread = threading.Thread(target=_run, name="shoal-keep-up", daemon=True)
            _thread.start()


def stop_refreshing(store: Refreshable) -> None:
    """Stop refreshing a store, because it was closed."""
    with _starting:
        _stores.discard(store)


def _run() -> None:
    while True:
        time.sleep(_SECONDS)
        with _starting:
            stores = list(_stores)
        while stores:
            # A store that cannot be read now is tried again in the next round. Its lookups report the error.
            with suppress(ShoalError):
                stores.pop().version()
