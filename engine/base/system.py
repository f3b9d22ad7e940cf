"""System calls that only some operating systems have. A server needs Linux. A store can be written and read on macOS,
too."""

import os
import sys

from shoal.engine.base.errors import SystemUnsupported

O_PATH: int = getattr(os, "O_PATH", os.O_RDONLY)


def check_can_serve() -> None:
    """Raise SystemUnsupported if the operating system is not Linux. A server relies on the signals, the process
    information and the sockets of Linux."""
    if sys.platform != "linux":
        raise SystemUnsupported(
            f"`shoal serve` needs Linux, but this is {sys.platform}; run it in a container, or look up in process"
        )


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def reserve(descriptor: int, start: int, size: int) -> None:
    """Allocate bytes of an open file on the disk. On systems without posix_fallocate(3), only extend the file.

    Raises:
        OSError: the disk has no room.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, start, size)
    elif os.fstat(descriptor).st_size < start + size:
        os.ftruncate(descriptor, start + size)


def sync_data(descriptor: int) -> None:
    """Write the data of an open file to the disk. Call fdatasync(2), or fsync(2) on systems without fdatasync(2)."""
    if hasattr(os, "fdatasync"):
        os.fdatasync(descriptor)
    else:
        os.fsync(descriptor)


def descriptor_path(descriptor: int) -> str:
    """Return a path that opens the file of a descriptor."""
    return f"/proc/self/fd/{descriptor}" if sys.platform == "linux" else f"/dev/fd/{descriptor}"
