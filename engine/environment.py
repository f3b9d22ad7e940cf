"""Open the LMDB environments of a store.

    <store>/live/<number>/             the mutable environment: catalog and overlay segments; small
    <store>/generations/<view>/<id>/   one environment per base generation, never written after it is committed

The live environment is opened once per process, as LMDB demands, and closes when the last object that refers to it
goes: whoever holds an address in its map must hold it too. A process that forked with it open cannot use it, so a
process that forks does not open it.

The highest number counts. One that a copy has replaced says so in its last commit, and is removed once nobody reads it.
"""

import errno
import mmap
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import lmdb

from engine.errors import (
    LOAD_AGAIN,
    START_ANEW,
    ShoalError,
    StoreDamaged,
    StoreFull,
    StoreLocked,
    StoreNotFound,
    StoreUnreadable,
)
from engine.lmdb_file import check_length

LIVE_MAP_SIZE = 256 << 30
"""Address space, not disk: a map that never has to grow never has to move."""
MAX_READERS = 2048
_READER_BYTES = 64
_FULL = 1 << 20
_DIRECTORY_MODE, _FILE_MODE, _LOCK_MODE = 0o750, 0o640, 0o660
"""Of what a store is made of: nothing in it is for everybody, whatever the umask, which decides about the group. LMDB's
readers note themselves in its lock file."""
DATA = "data.mdb"
"""The file of an environment that holds its pages."""


def live_paths(store: Path) -> list[Path]:
    """The mutable environment of a store, and behind it those that it replaced and that were not removed yet.

    Raises:
        StoreUnreadable: the system does not let the directory be read now.
    """
    directory = store / "live"
    try:
        found = [entry for entry in directory.iterdir() if entry.name.isdecimal()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StoreUnreadable(f"{directory} cannot be read now: {error}") from error
    return sorted(found, key=lambda entry: int(entry.name), reverse=True)


def live_path(store: Path) -> Path:
    """Where the mutable environment of a store is, or is to be."""
    return next(iter(live_paths(store)), store / "live" / "1")


def generations_path(store: Path, view: str) -> Path:
    """Where the base generations of a view are."""
    return store / "generations" / view


def generation_path(store: Path, view: str, generation_id: str) -> Path:
    """Where one base generation of a view is."""
    return generations_path(store, view) / generation_id


def make_directory(path: Path) -> None:
    """Make a directory of a store, and those above it that are missing. One that is there keeps its mode: whoever made
    it has decided."""
    if not path.parent.is_dir():
        make_directory(path.parent)
    path.mkdir(mode=_DIRECTORY_MODE, exist_ok=True)


def make_file(path: Path) -> None:
    """Make an empty file of a store, unless it is there."""
    path.touch(mode=_FILE_MODE)


class LiveEnvironment:
    """The mutable environment of a store, with its databases: the catalog, the overlays' chunks, and, for the writer,
    the pushes that were answered."""

    def __init__(self, path: Path, env: lmdb.Environment, *, writable: bool) -> None:
        self.path = path
        self.env = env
        self.writable = writable
        self.catalog = env.open_db(b"catalog", create=writable)
        self.segments = env.open_db(b"segments", create=writable)
        if writable:
            self.requests = env.open_db(b"requests")

    def last_transaction(self) -> int:
        """The id of the last committed transaction, which is the one that a read transaction begun now would show.

        It costs less than a microsecond. `info()["last_txnid"]` costs more, and names a commit while it is still on its
        way to the disk: for good, if its writer dies there.
        """
        transaction = self.env.begin()
        last = transaction.id()
        transaction.abort()
        return last

    def is_replaced(self, transaction: lmdb.Transaction) -> bool:
        """Whether the store goes on in a later environment, which was there before this one said so."""
        return transaction.get(_REPLACED, db=self.catalog) is not None

    def note_replaced(self, *, replaced: bool) -> None:
        """Have whoever reads it go over to the later one; or take that back, where the later one was removed by hand.

        Raises:
            StoreFull: there is no room to note it.
        """
        with store_full_named(self.path), self.env.begin(write=True) as transaction:
            if replaced:
                transaction.put(_REPLACED, b"", db=self.catalog)
            else:
                transaction.delete(_REPLACED, db=self.catalog)

    def page_bytes(self) -> tuple[int, int]:
        """The bytes of its pages in use, and of those in the file that are not."""
        with self.env.begin() as transaction:
            stats = [self.env.stat(), *(transaction.stat(db) for db in (self.catalog, self.segments, self.requests))]
        pages = sum(stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"] for stat in stats)
        size = stats[0]["psize"]
        return pages * size, (self.env.info()["last_pgno"] + 1 - pages) * size

    def oldest_reader(self) -> tuple[int, int] | None:
        """The oldest version that is being read, and the id of the process that does; None if nobody reads."""
        # LMDB's table of readers in the words of mdb_reader_list(): a line a reader, with its process, its thread, and
        # the transaction that it reads, "-" for none.
        lines = self.env.readers().splitlines()[1:]
        return min(
            ((int(version), int(pid)) for pid, _, version in map(str.split, lines) if version != "-"), default=None
        )


class ReadTransaction:
    """A read transaction on the live environment, which stays open while it is held, as no page that it shows is used
    again."""

    def __init__(self, live: LiveEnvironment) -> None:
        self.live = live
        self.lmdb = live.env.begin(buffers=True)


_REPLACED = b"replaced"
_live: "WeakValueDictionary[Path, LiveEnvironment]" = WeakValueDictionary()
_opening = threading.Lock()


def open_live(store: Path, *, writable: bool = False) -> LiveEnvironment:
    """The live environment of a store; only the store's writer opens it writable, which also creates it.

    Raises:
        StoreNotFound: there is no store at this path.
        StoreLocked: this process has it open for reading, and wants to write.
        StoreDamaged: its file was cut short, or LMDB does not accept it.
        StoreUnreadable: the system does not let it be opened now.
    """
    while True:
        path = live_path(store)
        try:
            return open_live_at(path, store, writable=writable)
        except ShoalError:
            # It may have been replaced and removed meanwhile.
            if live_path(store) == path:
                raise


def open_live_at(path: Path, store: Path, *, writable: bool) -> LiveEnvironment:
    """One of a store's live environments: see `open_live`."""
    path = path.resolve()
    with _opening:
        live = _live.get(path)
        if live is None:
            if writable:
                make_directory(path)
                allocate_lock(path)
            elif not (path / DATA).is_file():
                raise StoreNotFound(f"{store} is no Shoal store; `shoal load --store {store} --from ROOT` makes one")
            if not _has_content(path / DATA, store) and not writable:
                raise StoreNotFound(f"nothing was loaded into {store} yet; `shoal load` does")
            env = _open_live(path, writable=writable)
            try:
                with damage_named(path):
                    live = _live[path] = LiveEnvironment(path, env, writable=writable)
            except BaseException as error:
                # Whoever keeps the error would keep the environment open, and LMDB opens none twice in a process.
                env.close()
                if isinstance(error, lmdb.NotFoundError):
                    raise StoreNotFound(f"nothing was loaded into {store} yet; `shoal load` does") from None
                raise
        elif writable and not live.writable:
            raise StoreLocked(f"{store} is open for reading in this process; close its readers before writing to it")
        return live


def name_live(aside: Path, path: Path) -> LiveEnvironment:
    """Give a live environment that was made aside its place, where it is opened from now on, and open it writable.

    Raises:
        StoreUnreadable, StoreFull, StoreDamaged: it cannot be opened. It has no place then.
    """
    with _opening:
        env = _open_live(aside, writable=True)
        live = LiveEnvironment(path, env, writable=True)
        aside.rename(path)
        _live[path.resolve()] = live
        return live


def _has_content(path: Path, store: Path) -> bool:
    """Whether an environment's file has been written to; LMDB makes it before it does.

    Raises:
        StoreDamaged: it was cut short.
        StoreUnreadable: the system does not let it be read now.
    """
    try:
        if path.stat().st_size:
            check_length(path)
            return True
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StoreUnreadable(f"{path} cannot be opened now: {error}") from error
    if any(not entry.name.startswith(".") for entry in (store / "generations").glob("*/*")):
        raise StoreDamaged(
            f"{path} is empty, though there are generations that it named: it was cut short; {START_ANEW}"
        )
    return False


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn the ways in which LMDB says that what it reads makes no sense into StoreDamaged."""
    try:
        yield
    except (lmdb.InvalidError, lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.VersionMismatchError) as error:
        raise StoreDamaged(f"{path} is damaged: {error}; {START_ANEW}") from error


def allocate(path: Path, size: int) -> None:
    """Make a file, if it is not there, and give it its room on the disk, in bytes. Where a process first touches a page
    of a map for which there is none left, it dies: LMDB maps its table of readers, and makes it as a file with holes.

    Raises:
        OSError: there is no room for it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, _LOCK_MODE)
    try:
        os.posix_fallocate(descriptor, 0, size)
    finally:
        os.close(descriptor)


def allocate_lock(path: Path) -> None:
    """Give an environment its table of readers, as `allocate` does."""
    allocate(path / "lock.mdb", MAX_READERS * _READER_BYTES)


def map_generation(path: Path) -> memoryview:
    """The file of a committed base generation, mapped for reading for as long as a view of it is held.

    Nobody writes it, so it needs neither LMDB's lock nor a transaction; and LMDB's binding, asked for a value, first
    touches every page of it, which of all chunks together would be the whole store.

    Raises:
        StoreDamaged: it is not there, or nothing is in it.
        StoreUnreadable: the system refuses to open or map it now.
    """
    try:
        with (path / DATA).open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError) as error:
        raise StoreDamaged(
            f"generation {path} is missing, though the catalog names it ({error}); {LOAD_AGAIN}"
        ) from error
    except OSError as error:
        raise StoreUnreadable(
            f"generation {path} cannot be read now ({error}); see to it: the view is tried again every second"
        ) from error
    content.madvise(mmap.MADV_RANDOM)
    return memoryview(content)


@contextmanager
def store_full_named(path: Path) -> Iterator[None]:
    """Turn the ways in which LMDB and the system say that there is no room into StoreFull."""
    try:
        yield
    except lmdb.MapFullError as error:
        raise StoreFull(f"{path}: the map is full: {error}") from error
    except (lmdb.Error, OSError) as error:
        free = shutil.disk_usage(next(parent for parent in path.absolute().parents if parent.exists())).free
        if any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT)) or (
            # A write that was cut short, as the last one on a disk that fills up is, is an I/O error to LMDB.
            os.strerror(errno.EIO) in str(error) and free < _FULL
        ):
            raise StoreFull(
                f"{path}: the disk is full ({free >> 20} MiB free); free some room and load again"
            ) from error
        raise


def _open_live(path: Path, *, writable: bool) -> lmdb.Environment:
    return _open(path, readonly=not writable, map_size=LIVE_MAP_SIZE, max_dbs=3, max_readers=MAX_READERS)


def _open(path: Path, **options: Any) -> lmdb.Environment:
    try:
        with store_full_named(path), damage_named(path):
            return lmdb.open(str(path), readahead=False, mode=_FILE_MODE, **options)
    except lmdb.Error as error:
        raise StoreUnreadable(f"{path} cannot be opened now: {error}") from error
