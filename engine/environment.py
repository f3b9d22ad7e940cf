"""Open the LMDB environments of a store.

    <store>/live/<number>/             the mutable environment: catalog and overlay segments; small
    <store>/generations/<view>/<id>/   one environment per base generation, never written after it is committed

The live environment is opened once per process, as LMDB demands, and closes when the last object that refers to it
goes: whoever holds an address in its map must hold it too. A process that forked with it open cannot use it, so a
process that forks does not open it.

The highest number counts. One that a copy has replaced says so in its last commit, and is removed once nobody reads it.

Before LMDB reads an environment its pages are checked (`lmdb_trees`), and what is found is held against the store's own
record of how far it got (`begun`): a store that has less than it had is damaged, and nobody takes it for a new one.
"""

import errno
import mmap
import os
import resource
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import lmdb

from engine.begun import Begun, begun_path, read_begun
from engine.errors import (
    LOAD_AGAIN,
    START_ANEW,
    PathsSwapped,
    RootUnreadable,
    SettingsInvalid,
    ShoalError,
    StoreDamaged,
    StoreFull,
    StoreLocked,
    StoreMoved,
    StoreNotFound,
    StoreNotWritable,
    StoreUnreadable,
)
from engine.lmdb_file import check_length, check_metas
from engine.lmdb_trees import check_trees
from engine.reader_slots import SLOT_BYTES, claim_process_id, process_id_taken
from engine.seal import begin_sealing, read_seal, seal_commit

LIVE_MAP_VARIABLE = "SHOAL_LIVE_MAP_GIB"
_LIVE_MAP_GIB = 256
"""Address space, not disk: a map that never has to grow never has to move."""
MAX_READERS = 2048
_FULL = 1 << 20
_DIRECTORY_MODE, _FILE_MODE, _LOCK_MODE = 0o750, 0o640, 0o660
"""Of what a store is made of: nothing in it is for everybody, whatever the umask, which decides about the group. LMDB's
readers note themselves in its lock file."""
_FIRST = "1"
_READ, _TREES = frozenset((b"catalog", b"segments")), frozenset((b"catalog", b"segments", b"requests"))
"""The trees that every process reads, and those that there are."""
_TRIES, _RETRY_SECONDS = 100, 0.001
_PUBLISHED = ("*/deltas/*/manifest.json", "services.json", "dropped.json")
"""Files that identify an export root: a store has no such files. `engine.export_root` writes them."""
BACKUP = "backup.json"
"""The file that identifies a backup: see `loaders.backup`."""
DATA = "data.mdb"
"""The file of an environment that holds its pages."""
LOCK = "lock.mdb"
"""The file of an environment that holds its locks and its table of readers."""


def live_map_bytes() -> int:
    """Return the address space that a process reserves for a live environment, which is also its maximum size.

    Raises:
        SettingsInvalid: the environment variable is not a whole number of GiB.
    """
    text = os.environ.get(LIVE_MAP_VARIABLE, str(_LIVE_MAP_GIB))
    if not (text.isascii() and text.isdecimal() and 0 < int(text) <= 1 << 16):
        raise SettingsInvalid(f"{LIVE_MAP_VARIABLE} is {text!r}; give a whole number of GiB, 1 to 65536")
    return int(text) << 30


def check_address_space() -> None:
    """Raise SettingsInvalid if a process may not reserve the address space of a live environment."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit <= live_map_bytes():
        raise SettingsInvalid(
            f"a process may have {limit >> 20} MiB of address space (`ulimit -v`), but a store's map needs "
            f"{live_map_bytes() >> 30} GiB of it (neither memory nor disk): raise the limit, or set "
            f"{LIVE_MAP_VARIABLE} lower for all processes that open the store, but higher than `live` can ever be"
        )


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
    return next(iter(live_paths(store)), store / "live" / _FIRST)


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
        self._identity = _identity(path.parent.parent, path.name)

    def check_in_place(self, store: Path) -> None:
        """Check that a store's path still leads to the files that are open here. It costs two calls of the system.

        Raises:
            StoreMoved: they were moved, deleted, or replaced by others.
        """
        try:
            if _identity(store, self.path.name) == self._identity:
                return
            found = "other files are at its path"
        except OSError as error:
            found = error.strerror or str(error)
        raise StoreMoved(
            f"the store at {store} was moved, deleted or replaced while it was open ({found}); move it back, or "
            f"restart the server; until then no push, reload or definition is acknowledged"
        )

    def check_pages(self) -> None:
        """Check all its pages, also those that only a writer reads; raises StoreDamaged."""
        _check_pages(self.path, self.env, writable=True)

    @property
    def number(self) -> int:
        """Its number among the store's live environments."""
        return int(self.path.name)

    def progress(self) -> Begun | None:
        """How far the store is, by its catalog's seal; None if that was never sealed. Raises StoreDamaged."""
        with damage_named(self.path), self.env.begin() as transaction:
            seal = read_seal(transaction, self.catalog)
        return Begun(seal.store_id, self.number, seal.commit) if seal is not None else None

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

    def note_replaced(self) -> None:
        """Tell every reader to switch to the later environment.

        Raises:
            StoreFull: there is no room to note it.
        """
        with store_full_named(self.path), self.env.begin(write=True) as transaction:
            transaction.put(_REPLACED, b"", db=self.catalog)

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
    """The live environment of a store; only the store's writer opens it writable, which also creates it, unless the
    store was begun before.

    Raises:
        StoreNotFound: there is no store at this path.
        StoreLocked: this process has it open for reading, and wants to write.
        StoreDamaged: LMDB did not write its pages so, or it has less than the store had.
        StoreUnreadable: the system does not let it be opened now.
        SettingsInvalid: its map is larger than the address space that this process may have.
        ProcessIdTaken: a process of another PID namespace has it open under this process's id.
    """
    while True:
        # First of all: from here on a writer only adds to what it has recorded.
        begun = read_begun(store)
        path = live_path(store)
        try:
            return _opened(path, store, begun, writable=writable, is_newest=True)
        except ShoalError:
            # It may have been replaced and removed meanwhile.
            if live_path(store) == path:
                raise


def open_live_at(path: Path, store: Path, *, writable: bool) -> LiveEnvironment:
    """One of a store's live environments that another has replaced, or is about to: see `open_live`."""
    return _opened(path, store, None, writable=writable, is_newest=False)


def _opened(path: Path, store: Path, begun: Begun | None, *, writable: bool, is_newest: bool) -> LiveEnvironment:
    path = path.resolve()
    with _opening:
        live = _live.get(path)
        if live is not None and not _is_in_place(live, store):
            live = None  # Another was put in its place. Readers that have the old one open keep it.
        if live is None:
            is_new = _is_new(path, store, begun)
            if is_new and is_root(store):
                raise _is_a_root(store)
            if is_new and not writable:
                if (path / DATA).exists():
                    raise StoreNotFound(f"nothing was loaded into {store} yet; `shoal load` does")
                raise StoreNotFound(f"{store} is not a Shoal store; `shoal load --store {store} --from ROOT` makes one")
            if is_new:
                make_directory(path)
            if writable:
                allocate_lock(path)
            claim_process_id(path / LOCK)
            env = _open_live(path, writable=writable)
            try:
                with damage_named(path):
                    names = _check_pages(path, env, writable=writable)
                    if is_newest:
                        _check_progress(path, store, env, begun, names)
                    live = _live[path] = LiveEnvironment(path, env, writable=writable)
            except BaseException as error:
                # Whoever keeps the error would keep the environment open, and LMDB opens none twice in a process.
                env.close()
                if isinstance(error, lmdb.Error) and os.strerror(errno.EAGAIN) in str(error):
                    raise process_id_taken(path / LOCK) from None  # Another process took it just now.
                if isinstance(error, lmdb.NotFoundError | FileNotFoundError):
                    raise StoreNotFound(f"nothing was loaded into {store} yet; `shoal load` does") from None
                raise
        elif writable:
            if not live.writable:
                raise StoreLocked(
                    f"{store} is open for reading in this process; close its readers before writing to it"
                )
            if is_newest:
                with damage_named(path):
                    _check_progress(path, store, live.env, begun, set(_TREES))
        return live


def _is_new(path: Path, store: Path, begun: Begun | None) -> bool:
    """Whether a live environment has no content yet, because its store is new.

    Raises:
        StoreDamaged: it has none though the store was begun, or what it has was cut short.
        StoreUnreadable: the system does not let it be read now.
    """
    data = path / DATA
    try:
        if data.stat().st_size:
            check_length(data)
            check_metas(data)
            return False
        found = f"{data} is empty"
    except (FileNotFoundError, NotADirectoryError):
        found = f"{data} is missing"
    except OSError as error:
        raise StoreUnreadable(f"{data} cannot be opened now: {error}") from error
    if path.name != _FIRST and (others := [other for other in live_paths(store) if other.name != path.name]):
        raise StoreDamaged(
            f"{found}, though {path} is the newest directory in `live`. If it was made by hand, move it away: then the "
            f"store is in {others[0]}. Otherwise {START_ANEW}"
        )
    if begun is not None:
        raise StoreDamaged(f"{found}, and {begun_path(store)} records {begun}; {START_ANEW}")
    if has_generations(store):
        raise StoreDamaged(f"{found}, though there are generations that it named; {START_ANEW}")
    return True


def has_generations(store: Path) -> bool:
    """Whether a store has a base of a view that was completed."""
    return any(not entry.name.startswith(".") for entry in (store / "generations").glob("*/*"))


def is_store(store: Path) -> bool:
    """Whether a directory is a store, though it may have lost all or a part of its data."""
    try:
        return begun_path(store).is_file() or bool(live_paths(store))
    except OSError as error:
        raise StoreUnreadable(f"{store} cannot be read now: {error}") from error


def is_root(directory: Path) -> bool:
    """Whether a directory is an export root: something was published in it."""
    return any(any(directory.glob(pattern)) for pattern in _PUBLISHED)


def check_may_be_store(directory: Path) -> None:
    """Raise PathsSwapped if a directory is an export root or a backup, and so must not be written to as a store."""
    if is_root(directory):
        raise _is_a_root(directory)
    if (directory / BACKUP).is_file():
        raise PathsSwapped(
            f"{directory} is a backup, not a store: `shoal restore --from {directory} --to STORE` makes a store from it"
        )


def check_may_be_root(directory: Path) -> None:
    """Check that a directory, given as an export root, is not a store.

    Raises:
        PathsSwapped: it is a store.
        RootUnreadable: the system does not let it be read now.
    """
    try:
        found = is_store(directory)
    except StoreUnreadable as error:
        raise RootUnreadable(f"{error}; check its file system, and try again") from error
    if found:
        raise PathsSwapped(
            f"{directory} is a store, not an export root: give the directory that `shoal export` publishes to; are the "
            f"store and the root swapped?"
        )


def _is_a_root(directory: Path) -> PathsSwapped:
    return PathsSwapped(
        f"{directory} is an export root, not a store: give another directory as the store; are the store and the root "
        f"swapped?"
    )


@contextmanager
def refusal_named(path: Path) -> Iterator[None]:
    """Raise StoreNotWritable for an OSError of creating or writing at a path, unless the disk is full."""
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
            f"{path} cannot be written to: {error.strerror}; give the path of a directory that this user may write"
        ) from error


def whole_live(store: Path) -> Path | None:
    """A live environment that has all that its store recorded, though it is not the newest; None if there is none."""
    begun = read_begun(store)
    for path in live_paths(store)[1:]:
        with suppress(ShoalError):
            return _opened(path, store, begun, writable=False, is_newest=True).path
    return None


def _check_pages(path: Path, env: lmdb.Environment, *, writable: bool) -> set[bytes]:
    """Check the pages that LMDB will read, by a transaction that keeps them as they are; the names of its trees."""
    for _ in range(_TRIES):
        with env.begin() as transaction:
            try:
                return check_trees(path / DATA, transaction.id(), _READ, with_free_pages=writable)
            except LookupError:
                # Commits came meanwhile, and the file does not note this one any more. Or it never did: what other
                # processes that have it open say of the newest commit is not what the file says.
                commit = transaction.id()
        time.sleep(_RETRY_SECONDS)
    raise StoreDamaged(f"{path}: the newest commit {commit} is missing from the file; {START_ANEW}")


def _check_progress(path: Path, store: Path, env: lmdb.Environment, begun: Begun | None, names: set[bytes]) -> None:
    """Check that an environment, which has trees of these names, has all that its store had.

    Raises:
        StoreDamaged: it has less, or is another store's.
    """
    seal, is_replaced = None, False
    if b"catalog" in names:
        catalog = env.open_db(b"catalog", create=False)
        with env.begin() as transaction:
            seal, is_replaced = read_seal(transaction, catalog), transaction.get(_REPLACED, db=catalog) is not None
    if is_replaced:
        raise StoreDamaged(
            f"{path} was replaced by a newer directory in {path.parent}, and that directory is missing: bring it back. "
            f"Otherwise {START_ANEW}"
        )
    if begun is None:
        if b"catalog" not in names and has_generations(store):
            raise StoreDamaged(f"{path} has no catalog, though there are generations that it named; {START_ANEW}")
        return
    if seal is None or not names >= _TREES or (begun.is_readable and seal.store_id != begun.store_id):
        whose = f"belongs to store {seal.store_id.hex()[:8]}" if seal is not None else "has no seal of this store"
        raise StoreDamaged(f"{path} {whose}, but {begun_path(store)} records {begun}; {START_ANEW}")
    if int(path.name) < begun.live or seal.commit < begun.commit:
        raise StoreDamaged(
            f"{path} is at commit {seal.commit}, and {begun_path(store)} records {begun}: later commits were lost; "
            f"{START_ANEW}"
        )


def _identity(store: Path, number: str) -> tuple[int, int, int, int]:
    """What tells the files at a store's path from others that may come to lie there."""
    directory, data = os.stat(store), os.stat(f"{store}/live/{number}/{DATA}")
    return directory.st_dev, directory.st_ino, data.st_dev, data.st_ino


def _is_in_place(live: LiveEnvironment, store: Path) -> bool:
    try:
        live.check_in_place(store)
    except StoreMoved:
        return False
    return True


def seal_copy(path: Path, env: lmdb.Environment | None = None) -> None:
    """Have the seal of a copy that nobody has seen yet name the copy's own commit; a store without a seal gets one.

    Args:
        env: the copy, if it is open.

    Raises:
        StoreUnreadable, StoreFull, StoreDamaged: it cannot be opened or written.
    """
    opened = env if env is not None else _open_live(path, writable=True)
    catalog = opened.open_db(b"catalog")
    with store_full_named(path), opened.begin(write=True) as transaction:
        if read_seal(transaction, catalog) is None:
            begin_sealing(transaction, catalog)
        seal_commit(transaction, catalog)
    if env is None:
        opened.close()


def name_live(aside: Path, path: Path) -> LiveEnvironment:
    """Give a live environment that was made aside its place, where it is opened from now on, and open it writable.

    Raises:
        StoreUnreadable, StoreFull, StoreDamaged: it cannot be opened. It has no place then.
    """
    with _opening:
        env = _open_live(aside, writable=True)
        seal_copy(aside, env)
        aside.rename(path)
        live = LiveEnvironment(path.resolve(), env, writable=True)
        _live[live.path] = live
        return live


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
    allocate(path / LOCK, MAX_READERS * SLOT_BYTES)


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
        free = shutil.disk_usage(_existing(path)).free
        if any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT)) or (
            # A write that was cut short, as the last one on a disk that fills up is, is an I/O error to LMDB.
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


def _open_live(path: Path, *, writable: bool) -> lmdb.Environment:
    check_address_space()
    return _open(path, readonly=not writable, map_size=live_map_bytes(), max_dbs=3, max_readers=MAX_READERS)


def _open(path: Path, **options: Any) -> lmdb.Environment:
    try:
        with store_full_named(path), damage_named(path):
            return lmdb.open(str(path), readahead=False, mode=_FILE_MODE, **options)
    except lmdb.Error as error:
        raise StoreUnreadable(f"{path} cannot be opened now: {error}") from error
