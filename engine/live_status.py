"""How large the live environment of a store is, how much its disk has free, and who holds an old version of it: LMDB
uses no page again that such a process might still read, so that it grows with each commit until the writer replaces it.
"""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from engine.environment import DATA, live_paths, open_live, open_live_at
from engine.errors import ShoalError


def describe_live(store: Path) -> dict[str, Any]:
    """The bytes of the live environment's file and of those that it replaced, those that are free on its disk, and the
    process with the oldest version, how many versions that is behind, or None where all that read have the newest.

    Raises:
        StoreNotFound, StoreDamaged, StoreUnreadable: it cannot be opened.
    """
    live = open_live(store)
    return {
        "bytes": sum(_size(path / DATA) for path in live_paths(store)),
        "disk_free_bytes": shutil.disk_usage(live.path).free,
        "oldest_reader": _oldest_reader(store, live.last_transaction()),
    }


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0  # It was replaced, and has just been removed.


def _oldest_reader(store: Path, newest: int) -> dict[str, int] | None:
    readers = []
    for path in live_paths(store):
        with suppress(ShoalError):
            readers.append(open_live_at(path, store, writable=False).oldest_reader())
    version, pid = min((reader for reader in readers if reader is not None), default=(newest, 0))
    return {"pid": pid, "versions_behind": newest - version} if version < newest else None
