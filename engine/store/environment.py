"""Open the LMDB environments of a store.

    <store>/live/<number>/             the mutable environment: catalog and overlay segments; small
    <store>/generations/<view>/<id>/   one environment per base generation, never written after it is committed

LMDB demands that a process opens the live environment only once. The environment is closed when the last reference to
it is gone. So an object that holds an address in the environment's map must also hold a reference to the environment.
An environment that was opened before a fork is unusable after the fork. So a process must not open the environment
before it forks.

The live environment with the highest number is the current one. If a copy replaces an environment, the last commit of
the replaced environment notes the replacement. The replaced environment is removed when it has no readers.

Before LMDB reads an environment, its pages are checked (`lmdb_trees`), and its last commit is compared with the store's
progress record (`begun`). A store that is behind its record is damaged, and is never mistaken for a new store.
"""

import errno
import mmap
import os
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import lmdb

from shoal.engine.base.errors import (
    LOAD_AGAIN,
    START_ANEW,
    SettingsInvalid,
    ShoalError,
    StoreDamaged,
    StoreLocked,
    StoreMoved,
    StoreNotFound,
    StoreUnreadable,
)
from shoal.engine.format.paths import _FIRST, DATA, LOCK, _is_a_root, has_generations, is_root, live_path, live_paths
from shoal.engine.format.progress import Begun, begun_path, read_begun
from shoal.engine.format.seal import begin_sealing, read_seal, seal_commit
from shoal.engine.store.disk import FILE_MODE, allocate, make_directory, store_full_named
from shoal.engine.store.lmdb_file import check_length, check_metas
from shoal.engine.store.lmdb_trees import check_trees
from shoal.engine.store.reader_slots import SLOT_BYTES, claim_process_id, process_id_taken

LIVE_MAP_VARIABLE = "SHOAL_LIVE_MAP_GIB"
_LIVE_MAP_GIB = 256
"""The default size of the map in GiB. This is address space, not disk space. The map is so large that it never has to
grow, and therefore never has to move."""
MAX_READERS = 2048
_READ = frozenset((b"catalog", b"segments"))
_TREES = frozenset((b"catalog", b"segments", b"requests"))
"""_READ: the trees that every process reads. _TREES: all trees of a live environment."""
_TRIES, _RETRY_SECONDS = 100, 0.001


def live_map_bytes() -> int:
    """Return the address space in bytes that a process reserves for a live environment. This number is also the maximum
    size of the environment.

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
            f"{live_map_bytes() >> 30} GiB of it (neither memory nor disk): raise the limit, or set a lower "
            f"{LIVE_MAP_VARIABLE} for all processes that open the store, but above the maximum size of `live`"
        )


class LiveEnvironment:
    """The mutable environment of a store, with its databases: the catalog and the overlays' chunks. The writer also has
    the database of acknowledged pushes."""

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
        """Check that a store's path still leads to the open files. The check costs two system calls.

        Raises:
            StoreMoved: the files were moved, deleted, or replaced by other files.
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
        """Check all pages of the environment, including the pages that only a writer reads; raise StoreDamaged if a
        page is damaged."""
        _check_pages(self.path, self.env, writable=True)

    @property
    def number(self) -> int:
        """The environment's number among the store's live environments."""
        return int(self.path.name)

    def progress(self) -> Begun | None:
        """Return the store's progress according to its catalog's seal; None if the catalog was never sealed. Raise
        StoreDamaged if the seal cannot be read."""
        with damage_named(self.path), self.env.begin() as transaction:
            seal = read_seal(transaction, self.catalog)
        return Begun(seal.store_id, self.number, seal.commit) if seal is not None else None

    def last_transaction(self) -> int:
        """Return the id of the last committed transaction. A new read transaction would show this commit.

        The call takes less than a microsecond. `info()["last_txnid"]` takes longer, and it already names a commit while
        the writer is still writing the commit to the disk. If the writer dies then, `info()` names that commit forever.
        """
        transaction = self.env.begin()
        last = transaction.id()
        transaction.abort()
        return last

    def is_replaced(self, transaction: lmdb.Transaction) -> bool:
        """Return whether a later environment has replaced this one. The replacement is noted only after the later
        environment exists."""
        return transaction.get(_REPLACED, db=self.catalog) is not None

    def note_replaced(self) -> None:
        """Note in this environment that a later environment has replaced it. Every reader then switches to the later
        environment.

        Raises:
            StoreFull: there is no room for the note.
        """
        with store_full_named(self.path), self.env.begin(write=True) as transaction:
            transaction.put(_REPLACED, b"", db=self.catalog)

    def page_bytes(self) -> tuple[int, int]:
        """Return the size in bytes of the pages in use, and of the unused pages in the file."""
        with self.env.begin() as transaction:
            stats = [self.env.stat(), *(transaction.stat(db) for db in (self.catalog, self.segments, self.requests))]
        pages = sum(stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"] for stat in stats)
        size = stats[0]["psize"]
        return pages * size, (self.env.info()["last_pgno"] + 1 - pages) * size

    def oldest_reader(self) -> tuple[int, int] | None:
        """Return the oldest version with an open read transaction, and the id of the reading process; None if there is
        no such transaction."""
        # The text of LMDB's mdb_reader_list() has one line per reader: its process, its thread, and its transaction
        # ("-" if it has no transaction).
        lines = self.env.readers().splitlines()[1:]
        return min(
            ((int(version), int(pid)) for pid, _, version in map(str.split, lines) if version != "-"), default=None
        )


class ReadTransaction:
    """A read transaction on the live environment. The transaction stays open as long as this object exists, and LMDB
    reuses none of the transaction's pages meanwhile."""

    def __init__(self, live: LiveEnvironment) -> None:
        self.live = live
        self.lmdb = live.env.begin(buffers=True)


_REPLACED = b"replaced"
_live: "WeakValueDictionary[Path, LiveEnvironment]" = WeakValueDictionary()
_opening = threading.Lock()


def open_live(store: Path, *, writable: bool = False) -> LiveEnvironment:
    """Open the live environment of a store. Only the store's writer sets `writable`. With `writable`, the environment
    of a new store is created.

    Raises:
        StoreNotFound: there is no store at this path, or nothing was loaded into it yet.
        StoreLocked: this process wants to write, but has the environment open for reading.
        StoreDamaged: a page is not as LMDB wrote it, or data of the store is missing.
        StoreUnreadable: the operating system currently refuses to open the environment.
        SettingsInvalid: the map is larger than this process's limit on address space.
        ProcessIdTaken: a process in another PID namespace has the same process id as this process, and has the
            environment open.
    """
    while True:
        # Read the record before the environment. A commit between the two reads then only moves the environment ahead
        # of the record.
        begun = read_begun(store)
        path = live_path(store)
        try:
            return _opened(path, store, begun, writable=writable, is_newest=True)
        except ShoalError:
            # The environment may have been replaced and removed meanwhile. If so, open its successor.
            if live_path(store) == path:
                raise


def open_live_at(path: Path, store: Path, *, writable: bool) -> LiveEnvironment:
    """Open a live environment that another environment has replaced, or is about to replace; see `open_live`."""
    return _opened(path, store, None, writable=writable, is_newest=False)


def _opened(path: Path, store: Path, begun: Begun | None, *, writable: bool, is_newest: bool) -> LiveEnvironment:
    path = path.resolve()
    with _opening:
        live = _live.get(path)
        if live is not None and not _is_in_place(live, store):
            live = None  # Other files are at the path. Readers of the old environment keep the old environment open.
        if live is None:
            is_new = _is_new(path, store, begun)
            if is_new and is_root(store):
                raise _is_a_root(store)
            if is_new and not writable:
                if (path / DATA).exists():
                    raise StoreNotFound(f"nothing was loaded into {store} yet; run `shoal load`")
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
                # Close the environment now. Otherwise a stored exception would keep it open, and LMDB cannot open an
                # environment twice in one process.
                env.close()
                if isinstance(error, lmdb.Error) and os.strerror(errno.EAGAIN) in str(error):
                    raise process_id_taken(path / LOCK) from None  # Another process took the id just now.
                if isinstance(error, lmdb.NotFoundError | FileNotFoundError):
                    raise StoreNotFound(f"nothing was loaded into {store} yet; run `shoal load`") from None
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
    """Return whether a live environment has no content yet, because its store is new.

    Raises:
        StoreDamaged: the environment is empty although the store is not new, or its file is damaged or cut short.
        StoreUnreadable: the operating system currently refuses to read the file.
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
            f"{found}, although {path} is the newest directory in `live`. If somebody created it by hand, move it "
            f"away; the store's data is then in {others[0]}. Otherwise {START_ANEW}"
        )
    if begun is not None:
        raise StoreDamaged(f"{found}, but {begun_path(store)} records {begun}; {START_ANEW}")
    if has_generations(store):
        raise StoreDamaged(f"{found}, although the store has base generations; {START_ANEW}")
    return True


def whole_live(store: Path) -> Path | None:
    """Return the path of an older live environment that has all commits of the store's progress record; None if no such
    environment exists."""
    begun = read_begun(store)
    for path in live_paths(store)[1:]:
        with suppress(ShoalError):
            return _opened(path, store, begun, writable=False, is_newest=True).path
    return None


def _check_pages(path: Path, env: lmdb.Environment, *, writable: bool) -> set[bytes]:
    """Check the pages that LMDB will read, and return the names of the trees. During the check, a read transaction
    prevents the reuse of the pages."""
    for _ in range(_TRIES):
        with env.begin() as transaction:
            try:
                return check_trees(path / DATA, transaction.id(), _READ, with_free_pages=writable)
            except LookupError:
                # Either later commits have overwritten this commit's meta page, or the file never had this commit. In
                # the second case, LMDB got the id of the commit from other processes that have the environment open.
                commit = transaction.id()
        time.sleep(_RETRY_SECONDS)
    raise StoreDamaged(f"{path}: the newest commit {commit} is missing from the file; {START_ANEW}")


def _check_progress(path: Path, store: Path, env: lmdb.Environment, begun: Begun | None, names: set[bytes]) -> None:
    """Check that an environment has all commits of the store's progress record. `names` are the names of its trees.

    Raises:
        StoreDamaged: the environment is incomplete, was replaced, or belongs to another store.
    """
    seal, is_replaced = None, False
    if b"catalog" in names:
        catalog = env.open_db(b"catalog", create=False)
        with env.begin() as transaction:
            seal = read_seal(transaction, catalog)
            is_replaced = transaction.get(_REPLACED, db=catalog) is not None
    if is_replaced:
        raise StoreDamaged(
            f"{path} was replaced by a newer directory in {path.parent}, and that directory is missing: bring it back. "
            f"Otherwise {START_ANEW}"
        )
    if begun is None:
        if b"catalog" not in names and has_generations(store):
            raise StoreDamaged(f"{path} has no catalog, although the store has base generations; {START_ANEW}")
        return
    if seal is None or not names >= _TREES or (begun.is_readable and seal.store_id != begun.store_id):
        whose = f"belongs to store {seal.store_id.hex()[:8]}" if seal is not None else "has no seal of this store"
        raise StoreDamaged(f"{path} {whose}, but {begun_path(store)} records {begun}; {START_ANEW}")
    if int(path.name) < begun.live or seal.commit < begun.commit:
        raise StoreDamaged(
            f"{path} is at commit {seal.commit}, but {begun_path(store)} records {begun}: later commits were lost; "
            f"{START_ANEW}"
        )


def _identity(store: Path, number: str) -> tuple[int, int, int, int]:
    """Return the devices and inodes of the store's directory and of its data file. Other files at the same path have
    another identity."""
    directory = os.stat(store)
    data = os.stat(f"{store}/live/{number}/{DATA}")
    return directory.st_dev, directory.st_ino, data.st_dev, data.st_ino


def _is_in_place(live: LiveEnvironment, store: Path) -> bool:
    try:
        live.check_in_place(store)
    except StoreMoved:
        return False
    return True


def seal_copy(path: Path, env: lmdb.Environment | None = None) -> None:
    """Update the seal of a new copy so that it names the copy's own commit. A copy without a seal gets a seal. Other
    processes must not have the copy open yet.

    Args:
        env: the environment of the copy, if it is already open.

    Raises:
        StoreUnreadable, StoreFull, StoreDamaged: the copy cannot be opened or written.
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
    """Rename a new live environment from `aside` to its final path, and open it writable. From then on, `open_live`
    opens the environment at that path.

    Raises:
        StoreUnreadable, StoreFull, StoreDamaged: the environment cannot be opened. In this case it is not renamed.
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
    """Translate LMDB's errors about damaged data into StoreDamaged."""
    try:
        yield
    except (lmdb.InvalidError, lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.VersionMismatchError) as error:
        raise StoreDamaged(f"{path} is damaged: {error}; {START_ANEW}") from error


def allocate_lock(path: Path) -> None:
    """Create the lock file of an environment, with disk space for its reader table (see `allocate`)."""
    allocate(path / LOCK, MAX_READERS * SLOT_BYTES)


def map_generation(path: Path) -> memoryview:
    """Map the file of a committed base generation for reading. The file stays mapped as long as a memoryview of the map
    exists.

    The file is never written again, so this function needs neither LMDB's lock nor a transaction. It does not use
    LMDB's Python binding either, because the binding touches every page of a value before it returns the value. For all
    chunks together, these pages are the whole store.

    Raises:
        StoreDamaged: the file is missing or empty.
        StoreUnreadable: the operating system currently refuses to open or map the file.
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
            f"generation {path} cannot be read now ({error}); check its file system: Shoal tries the view again every "
            f"second"
        ) from error
    content.madvise(mmap.MADV_RANDOM)
    return memoryview(content)


def _open_live(path: Path, *, writable: bool) -> lmdb.Environment:
    check_address_space()
    return _open(path, readonly=not writable, map_size=live_map_bytes(), max_dbs=3, max_readers=MAX_READERS)


def _open(path: Path, **options: Any) -> lmdb.Environment:
    try:
        with store_full_named(path), damage_named(path):
            return lmdb.open(str(path), readahead=False, mode=FILE_MODE, **options)
    except lmdb.Error as error:
        raise StoreUnreadable(f"{path} cannot be opened now: {error}") from error
