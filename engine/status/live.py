"""The size of a store's live environment, the free space of its disk, and the process that reads its oldest version.

LMDB does not reuse a page that a reader of an old version might still read. So the environment grows with each commit,
until the writer replaces it.
"""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from shoal.engine.base.errors import ShoalError
from shoal.engine.format.paths import DATA, live_paths
from shoal.engine.store.environment import open_live, open_live_at


def describe_live(store: Path) -> dict[str, Any]:
    """Return the size of the live environment, the free space of its disk, and its oldest reader.

    `bytes` is the total size of the environment's file and of the replaced files that still exist. `disk_free_bytes` is
    the free space in bytes. `oldest_reader` has the process that reads the oldest version, and how many versions this
    process is behind. `oldest_reader` is None if every reader has the newest version.

    Raises:
        StoreNotFound, StoreDamaged, StoreUnreadable: the store cannot be opened.
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
        return 0  # The environment was replaced, and has just been removed.


def _oldest_reader(store: Path, newest: int) -> dict[str, int] | None:
    readers = []
    for path in live_paths(store):
        with suppress(ShoalError):
            readers.append(open_live_at(path, store, writable=False).oldest_reader())
    version, pid = min((reader for reader in readers if reader is not None), default=(newest, 0))
    return {"pid": pid, "versions_behind": newest - version} if version < newest else None
