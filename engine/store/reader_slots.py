"""Clear slots of LMDB's reader table that a dead process with this process's id left behind.

LMDB distinguishes the processes that read an environment only by their ids. Each process writes its id to its slots.
Each process also locks one byte of the lock file, at the offset of its id, to show other processes that it is alive. In
different PID namespaces (containers that share a volume) two processes may have the same id:

- While both are alive, LMDB rejects the second process, and the error is only EAGAIN.
- When one process is dead, its slots look like slots of the other process, and are never cleared. LMDB then never
  reuses the pages that these slots protect.

Source: the structs MDB_txninfo and MDB_reader, and mdb_reader_pid, in mdb.c of LMDB 0.9.
"""

import errno
import fcntl
import os
import struct
from pathlib import Path

from shoal.engine.base.errors import ProcessIdTaken
from shoal.engine.store.lmdb_file import MAGIC

_FORMAT = 0x10001
_HEAD = struct.Struct("=II")
_FIRST_SLOT, SLOT_BYTES, _ID_IN_SLOT = 128, 64, 8
_ID_BYTES = 4


def claim_process_id(lock: Path) -> None:
    """Check that no other process reads an environment under this process's id, and clear slots that a dead process
    left under that id. Call this before LMDB opens the environment, because closing the lock file releases all of this
    process's locks on the file.

    Args:
        lock: the environment's lock file.

    Raises:
        ProcessIdTaken: another process reads the environment under this id.
    """
    try:
        descriptor = os.open(lock, os.O_RDWR)
    except OSError:
        return  # The file does not exist yet, or LMDB will report what is wrong with it.
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, os.getpid())
        _clear(descriptor)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise process_id_taken(lock) from None
        raise
    finally:
        os.close(descriptor)


def process_id_taken(lock: Path) -> ProcessIdTaken:
    """Return the error for a process with the same id as another process."""
    return ProcessIdTaken(
        f"{lock.parent} is read by a process of another PID namespace that has the same process id, {os.getpid()}, and "
        f"LMDB tells its readers apart by their ids: let the containers share one PID namespace (in Kubernetes "
        f"`shareProcessNamespace: true`, in Docker `--pid=container:NAME`)"
    )


def _clear(descriptor: int) -> None:
    """Clear all slots under this process's id. The caller has locked the byte of this id, so no other living process
    has or can get these slots."""
    table = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    if table[: _HEAD.size] != _HEAD.pack(MAGIC, _FORMAT):
        return
    own = os.getpid().to_bytes(_ID_BYTES, "little")
    for slot in range(_FIRST_SLOT + _ID_IN_SLOT, len(table), SLOT_BYTES):
        if table[slot : slot + _ID_BYTES] == own:
            os.pwrite(descriptor, bytes(_ID_BYTES), slot)
