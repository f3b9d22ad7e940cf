"""Sample the resources of a server: memory, descriptors and threads of each process, and disk space."""

import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from shoal import FeatureStore
from shoal.engine.process.run_directory import ServerRecord, read_server_record
from shoal.engine.store.environment import open_live

MIB = 1 << 20
_REFERENCE = bytes(MIB)
_PAGE = 4096


def sample(store: Path, root: Path, reader: FeatureStore) -> dict[str, float]:
    """Return the samples by name, with sizes in MiB.

    Raises:
        AssertionError: no server runs on the store.
    """
    record = read_server_record(store)
    assert record is not None, f"nobody serves {store}"
    found: dict[str, float] = {}
    for role, pid in roles(record).items():
        process = psutil.Process(pid)
        memory = process.memory_full_info()
        found |= {f"{role} {kind}, MiB": getattr(memory, kind.lower()) / MIB for kind in ("RSS", "PSS", "USS")}
        found[f"{role} descriptors"] = process.num_fds()
        found[f"{role} threads"] = process.num_threads()
    for part in ("live", "generations", "run"):
        found[f"store {part}, MiB"] = disk_usage(store / part) / MIB
    found["root, MiB"] = disk_usage(root) / MIB
    version = reader.version()  # Moves this reader to the newest version, so that old pages can be reused.
    info = open_live(store).env.info()
    found["live map used, MiB"] = info["last_pgno"] * _PAGE / MIB
    found["readers' places"] = info["num_readers"]
    found["overlays"] = max(len(view.record.overlays) for view in version.views.values())
    found["reference, ms"] = 1e3 * min(_reference() for _ in range(5))
    return found


def roles(record: ServerRecord) -> dict[str, int]:
    """Return the process ids of a server by role."""
    assert record.writer is not None
    workers = {f"worker {place}": pid for place, pid in enumerate(record.workers)}
    return {"supervisor": record.pid, "writer": record.writer, **workers}


def disk_usage(path: Path) -> int:
    """Return the allocated disk space of a directory in bytes."""
    return sum(_allocated(path))


def _allocated(path: Path) -> Iterator[int]:
    try:
        entries = list(os.scandir(path))
    except FileNotFoundError:
        return  # The directory was removed meanwhile.
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _allocated(Path(entry.path))
        else:
            try:
                yield entry.stat(follow_symlinks=False).st_blocks * 512
            except FileNotFoundError:
                continue


def _reference() -> float:
    """Return the seconds that a small fixed computation takes, as a measure of the machine's current speed."""
    started = time.perf_counter()
    hashlib.sha256(_REFERENCE).digest()
    return time.perf_counter() - started
