"""The run directory: the files with which other processes find a store's running server.

    <store>/run/server.json    the server's processes and address: for `shoal status` and the workers
    <store>/run/server.lock    held by the supervisor and its children for as long as any of them lives
    <store>/run/standing.json    see `shoal.engine.status.replication`
    <store>/run/metrics/       the workers' counters (see `shoal.engine.server.metrics`)
    <store>/run/writer.sock    see `shoal.engine.process.control`
    <store>/run/supervisor.sock    see `shoal.engine.process.handover`

The directory contains no data: it may be removed while no server runs. If a part is removed while a server runs, the
process that made the part creates it again. Only the server's user can access the directory, because the writer's
socket accepts commands.
"""

import errno
import fcntl
import logging
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from shoal.engine.base.errors import (
    RunDirectoryPrivate,
    ServerRunning,
    SettingsInvalid,
    StoreNotWritable,
)
from shoal.engine.base.failpoints import reached
from shoal.engine.format.paths import check_may_be_store
from shoal.engine.store.disk import make_directory, refusal_named

log = logging.getLogger("shoal.supervisor")

_LOCK_SECONDS = 5.0
_LOCK_POLL_SECONDS = 0.05
_SETTLED_SECONDS = 0.5


_MODE = 0o700


class ServerRecord(BaseModel):
    """A running server: its supervisor's process id and start time (see `started_at`), its address (http://…, or unix:
    and a path), and the process ids of its workers and its writer."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    pid: PositiveInt
    started_at: int
    address: str
    workers: tuple[PositiveInt, ...] = ()
    writer: PositiveInt | None = None


def run_path(store: Path) -> Path:
    """Return the path of a store's run directory."""
    return store / "run"


def make_run_directory(store: Path) -> Path:
    """Return the run directory; create it if it is missing, and make it private.

    Raises:
        RunDirectoryPrivate: the directory belongs to another user.
        PathsSwapped: the store's path is that of an export root or a backup.
        StoreNotWritable: the store cannot be written to.
        OSError: the store's disk is full.
    """
    path = run_path(store)
    with refusal_named(store):
        check_may_be_store(store)
        make_directory(store)
        path.mkdir(mode=_MODE, exist_ok=True)
        if os.statvfs(path).f_flag & os.ST_RDONLY:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    try:
        if stat.S_IMODE(path.stat().st_mode) != _MODE:
            path.chmod(_MODE)
    except PermissionError:
        raise _private(path) from None
    if not os.access(path, os.W_OK | os.X_OK):
        if path.stat().st_uid == os.geteuid():
            raise StoreNotWritable(
                f"{path} cannot be written to: check its permissions, and whether its disk is read-only"
            )
        raise _private(path)
    return path


def read_server_record(store: Path) -> ServerRecord | None:
    """Return the record of the server that runs on a store; None if no server runs, even if a killed server left its
    record.

    Raises:
        RunDirectoryPrivate: another user serves the store.
    """
    try:
        record = ServerRecord.model_validate_json(_record_path(store).read_bytes())
        alive = started_at(record.pid) == record.started_at
    except (FileNotFoundError, NotADirectoryError, ProcessLookupError, ValidationError):
        return None
    except PermissionError:
        raise _private(run_path(store)) from None
    return record if alive else None


def write_server_record(store: Path, record: ServerRecord) -> None:
    """Replace the server's record atomically."""
    path = _record_path(store)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(record.model_dump_json())
    reached("server.record-aside")
    temporary.replace(path)
    reached("server.recorded")


def has_server_record(store: Path) -> bool:
    """Return whether the store has a server's record, of a running or a dead server."""
    return _record_path(store).exists()


def remove_server_record(store: Path) -> None:
    """Remove the server's record, because the server ends."""
    _record_path(store).unlink(missing_ok=True)


@contextmanager
def serving(store: Path, inherited: int | None = None) -> Iterator[int]:
    """Take the lock with which a server may serve a store, and yield its descriptor.

    Children inherit the descriptor in a fork. So a new supervisor can take the lock of a killed supervisor only after
    the children of the killed supervisor have ended, too. This function waits until they have ended.

    Args:
        inherited: the descriptor of a lock that another server passed on. This lock is then used instead of a new one.

    Raises:
        RunDirectoryPrivate: another user writes to the store.
        PathsSwapped, StoreNotWritable: a store cannot be at this path.
        ServerRunning: another server has the lock.
        SettingsInvalid: the store's disk is full.
    """
    if inherited is not None:
        with os.fdopen(inherited, "w") as lock:
            yield lock.fileno()
        return
    try:
        make_run_directory(store)
        lock_file = _lock_path(store).open("w")
    except OSError as error:
        raise SettingsInvalid(f"cannot write to the store {str(store)!r}: {error}") from error
    with lock_file as lock:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                record = read_server_record(store)
                if record is not None or time.monotonic() > deadline:
                    who = f"process {record.pid} at {record.address}" if record else "another server"
                    raise ServerRunning(
                        f"{store} is served by {who}; stop it first, or replace it with --replace"
                    ) from None
                time.sleep(_LOCK_POLL_SECONDS)
        reached("server.locked")
        yield lock.fileno()


def metrics_path(store: Path) -> Path:
    """Return the directory of the workers' counters."""
    return run_path(store) / "metrics"


def clear_metrics(store: Path) -> Path:
    """Empty the directory of the workers' counters, and return its path."""
    path = metrics_path(store)
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def _private(path: Path) -> RunDirectoryPrivate:
    owner = path.stat().st_uid
    return RunDirectoryPrivate(
        f"{path} is private to user {owner}, but this process runs as user {os.geteuid()}; run it as user {owner}"
    )


class RunDirectoryKeeper:
    """A keeper of the run directory's shared parts, which belong to no single process.

    The parts are the directory itself, the server's lock, and the directory of counters. If they are removed while a
    server runs, the keeper creates them again. It does nothing if the store itself was moved or deleted.

    Args:
        lock: the descriptor of the server's lock. If the lock file was removed, the descriptor then refers to the new
            lock file.
    """

    def __init__(self, store: Path, lock: int) -> None:
        self._store = store
        self._lock = lock
        self._is_store = is_same_file(store)
        self._seen: list[str] | None = []
        self._seen_at = 0.0
        self._told: str | None = None

    def mend(self) -> bool:
        """Create missing parts again; if that fails, the next call tries again.

        Returns:
            Whether files may be created in the directory. False while the directory's content changes, because somebody
            may be deleting the whole store.
        """
        if not self._is_store(self._store) or not self._is_settled():
            return False
        try:
            make_run_directory(self._store)
            metrics_path(self._store).mkdir(exist_ok=True)
            mend_lock(_lock_path(self._store), self._lock)
        except (OSError, RunDirectoryPrivate, StoreNotWritable) as error:
            if str(error) != self._told:
                log.error("%s cannot be created again: %s", run_path(self._store), error)
            self._told = str(error)
            return False
        self._told = None
        return True

    def _is_settled(self) -> bool:
        try:
            found = sorted(os.listdir(run_path(self._store)))
        except OSError:
            found = None
        if found != self._seen:
            self._seen = found
            self._seen_at = time.monotonic()
        return time.monotonic() > self._seen_at + _SETTLED_SECONDS


def is_same_file(path: Path) -> Callable[[Path], bool]:
    """Return a function that tests whether a path leads to the same file as `path` does now."""
    known = path.stat()

    def is_same(other: Path) -> bool:
        try:
            return os.path.samestat(other.stat(), known)
        except FileNotFoundError:
            return False

    return is_same


def mend_lock(path: Path, held: int) -> bool:
    """Lock the file at a path if the descriptor `held` has locked another file. After that, `held` refers to the file
    at the path.

    Returns:
        Whether a new lock was necessary.

    Raises:
        BlockingIOError: another process locked the file meanwhile.
        OSError: the file cannot be created.
    """
    with suppress(FileNotFoundError):
        if os.path.samestat(path.stat(), os.fstat(held)):
            return False
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.dup2(lock.fileno(), held, inheritable=os.get_inheritable(held))
    return True


def _lock_path(store: Path) -> Path:
    return run_path(store) / "server.lock"


def _record_path(store: Path) -> Path:
    return run_path(store) / "server.json"


def started_at(pid: int) -> int:
    """Return when a process started, in clock ticks since the machine's boot: field 22 of proc(5)'s stat. A date would
    change whenever the clock is set.

    Raises:
        FileNotFoundError, ProcessLookupError: the process is gone.
    """
    # The second field is the command's name in parentheses. It may contain any characters.
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
