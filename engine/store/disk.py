"""Create the files and directories of a store, with their modes, and translate the errors of the disk."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb

from shoal.engine.base.errors import (
    StoreFull,
    StoreNotWritable,
)
from shoal.engine.base.system import reserve

_FULL = 1 << 20

DIRECTORY_MODE, FILE_MODE, LOCK_MODE = 0o750, 0o640, 0o660
"""The modes of a store's directories and files. Other users get no access, whatever the umask is. The umask decides
which access the group gets. The group may write to the lock file, because LMDB's readers register in it."""


def make_directory(path: Path) -> None:
    """Create a directory of a store, and its missing parents. An existing directory keeps its mode, because its creator
    chose it."""
    if not path.parent.is_dir():
        make_directory(path.parent)
    path.mkdir(mode=DIRECTORY_MODE, exist_ok=True)


def make_file(path: Path) -> None:
    """Create an empty file of a store, unless it exists."""
    path.touch(mode=FILE_MODE)


@contextmanager
def refusal_named(path: Path) -> Iterator[None]:
    """Translate an OSError from creating or writing a file at a path into StoreNotWritable, unless the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        if error.errno == errno.EROFS:
            raise StoreNotWritable(
                f"{path} is on a file system that is mounted read-only: mount it for writing, or give another path"
            ) from error
        raise StoreNotWritable(
            f"{path} cannot be written to: {error.strerror}; give the path of a directory that this user may write to"
        ) from error


def allocate(path: Path, size: int) -> None:
    """Create a file if it does not exist, and allocate `size` bytes for it on the disk. LMDB creates its reader table
    as a sparse file and maps the file into memory. Without this allocation, a process on a full disk would die when it
    first touches a page of the map.

    Raises:
        OSError: the disk has no room for the file.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, LOCK_MODE)
    try:
        reserve(descriptor, 0, size)
    finally:
        os.close(descriptor)


@contextmanager
def store_full_named(path: Path) -> Iterator[None]:
    """Translate the out-of-space errors of LMDB and of the operating system into StoreFull."""
    try:
        yield
    except lmdb.MapFullError as error:
        raise StoreFull(f"{path}: the map is full: {error}") from error
    except (lmdb.Error, OSError) as error:
        free = shutil.disk_usage(_existing(path)).free
        if any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT)) or (
            # When the disk fills up, the last write is cut short. LMDB reports a short write as an I/O error.
            os.strerror(errno.EIO) in str(error) and free < _FULL
        ):
            if _lacks_inodes(path):
                raise StoreFull(f"{path}: the disk has no inodes left; remove files from it and load again") from error
            raise StoreFull(
                f"{path}: the disk is full ({free >> 20} MiB free); free some room and load again"
            ) from error
        raise


def _existing(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())


def _lacks_inodes(path: Path) -> bool:
    found = os.statvfs(_existing(path))
    return found.f_files > 0 and found.f_favail == 0
