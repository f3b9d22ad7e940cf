"""How large the live environment of a store is, how much its disk has free, and who holds an old version of it: LMDB
uses no page again that such a process might still read, so that it grows with each commit until that goes on.
"""

import shutil
from pathlib import Path
from typing import Any

from engine.environment import DATA, LiveEnvironment, open_live


def describe_live(store: Path) -> dict[str, Any]:
    """The bytes of the live environment's file, those that are free on its disk, and the process with the oldest
    version, how many versions that is behind, or None where all that read have the newest.

    Raises:
        StoreNotFound, StoreDamaged, StoreUnreadable: it cannot be opened.
    """
    live = open_live(store)
    return {
        "bytes": (live.path / DATA).stat().st_size,
        "disk_free_bytes": shutil.disk_usage(live.path).free,
        "oldest_reader": _oldest_reader(live),
    }


def _oldest_reader(live: LiveEnvironment) -> dict[str, int] | None:
    # LMDB's table of readers in the words of mdb_reader_list(): a line a reader, with its process, its thread, and the
    # transaction that it reads, "-" for none.
    lines = live.env.readers().splitlines()[1:]
    reading = [(int(version), int(pid)) for pid, _, version in map(str.split, lines) if version != "-"]
    if not reading:
        return None
    version, pid = min(reading)
    behind = live.last_transaction() - version
    return {"pid": pid, "versions_behind": behind} if behind > 0 else None
