"""The slots of LMDB's table of readers that stand under this process's id.

LMDB tells the processes that read an environment apart by their ids alone. Each locks the byte of its lock file at the
offset of its id, by which others know that it is alive, and notes the id in its slots. In different PID namespaces
(containers that share a volume) two processes may have the same id:

- While both are alive, LMDB refuses the second, and says no more than EAGAIN.
- Once one is dead, its slots seem to be the other's, and nobody clears them. No page that they might read is used
  again.

Source: the structs MDB_txninfo and MDB_reader, and mdb_reader_pid, in mdb.c of LMDB 0.9.
"""

import errno
import fcntl
import os
import struct
from pathlib import Path

from engine.errors import ProcessIdTaken
from engine.lmdb_file import MAGIC

_FORMAT = 0x10001
_HEAD = struct.Struct("=II")
_FIRST_SLOT, SLOT_BYTES, _ID_IN_SLOT = 128, 64, 8
_ID_BYTES = 4


def claim_process_id(lock: Path) -> None:
    """Check that no other process reads an environment under this process's id, and clear the slots that a dead one
    left under it. Call it before LMDB opens the environment: whoever closes the file gives up all locks on it.

    Args:
        lock: the environment's lock file.

    Raises:
        ProcessIdTaken: another process does.
    """
    try:
        descriptor = os.open(lock, os.O_RDWR)
    except OSError:
        return  # It is not there yet, or LMDB will say what is wrong with it.
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
    """The error of a process whose id another one has."""
    return ProcessIdTaken(
        f"{lock.parent} is read by a process of another PID namespace that has the same process id, {os.getpid()}, and "
        f"LMDB tells its readers apart by their ids: let the containers share one PID namespace (in Kubernetes "
        f"`shareProcessNamespace: true`, in Docker `--pid=container:NAME`)"
    )


def _clear(descriptor: int) -> None:
    """Clear all slots under this process's id, whose byte is locked: no living process has them, and none but this one
    will."""
    table = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    if table[: _HEAD.size] != _HEAD.pack(MAGIC, _FORMAT):
        return
    own = os.getpid().to_bytes(_ID_BYTES, "little")
    for slot in range(_FIRST_SLOT + _ID_IN_SLOT, len(table), SLOT_BYTES):
        if table[slot : slot + _ID_BYTES] == own:
            os.pwrite(descriptor, bytes(_ID_BYTES), slot)
