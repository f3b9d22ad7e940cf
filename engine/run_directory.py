"""What a running server leaves in the store for other processes to find.

    <store>/run/server.json    who serves the store, and where: for `shoal status` and the workers
    <store>/run/server.lock    held by the supervisor and its children for as long as any of them lives
    <store>/run/standing.json    see `engine.standing`
    <store>/run/metrics/       the workers' counters (see `engine.server.metrics`)
    <store>/run/writer.sock    see `engine.control`
    <store>/run/supervisor.sock    see `engine.handover`

None of it is data: it may be removed while no server runs. If a part is removed while a server runs, the process that
made it creates it again. Only the server's user can access it, because the writer's socket accepts commands.
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

from engine.environment import check_may_be_store, make_directory, refusal_named
from engine.errors import RunDirectoryPrivate, ServerRunning, SettingsInvalid, StoreNotWritable
from engine.failpoints import reached

log = logging.getLogger("shoal.supervisor")

_LOCK_SECONDS = 5.0
_LOCK_POLL_SECONDS = 0.05
_SETTLED_SECONDS = 0.5


_MODE = 0o700


class ServerRecord(BaseModel):
    """A running server: its supervisor's process and when that started (see `started_at`), where it listens (an
    http:// address, or unix: and a path), and the processes that it runs now."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    pid: PositiveInt
    started_at: int
    address: str
    workers: tuple[PositiveInt, ...] = ()
    writer: PositiveInt | None = None


def run_path(store: Path) -> Path:
    """The directory of all this."""
    return store / "run"


def make_run_directory(store: Path) -> Path:
    """Return the run directory; create it if it is missing, and make it private.

    Raises:
        RunDirectoryPrivate: it is another user's.
        PathsSwapped: the path is that of an export root or a backup.
        StoreNotWritable: the store cannot be written to.
        OSError: its disk is full.
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
    """The server that runs on a store; None if none does, even where a killed one left its record.

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
    """Replace the record, atomically."""
    path = _record_path(store)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(record.model_dump_json())
    reached("server.record-aside")
    temporary.replace(path)
    reached("server.recorded")


def has_server_record(store: Path) -> bool:
    """Whether there is a record of any server."""
    return _record_path(store).exists()


def remove_server_record(store: Path) -> None:
    """The server ends."""
    _record_path(store).unlink(missing_ok=True)


@contextmanager
def serving(store: Path, inherited: int | None = None) -> Iterator[int]:
    """Take the right to serve a store, as a descriptor that may be passed on; `inherited` is one that was passed on.
    Children inherit it over a fork. So a new supervisor can replace a killed one only after the children have ended,
    too; this function waits for that.

    Raises:
        RunDirectoryPrivate: another user writes to the store.
        PathsSwapped, StoreNotWritable: a store cannot be at this path.
        ServerRunning: another server has it.
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
        raise SettingsInvalid(f"store is {str(store)!r}, which cannot be written to: {error}") from error
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
                        f"{store} is served by {who}; stop it first, or take its place: --replace"
                    ) from None
                time.sleep(_LOCK_POLL_SECONDS)
        reached("server.locked")
        yield lock.fileno()


def metrics_path(store: Path) -> Path:
    """The directory of the workers' counters."""
    return run_path(store) / "metrics"


def clear_metrics(store: Path) -> Path:
    """The directory of the workers' counters, empty."""
    path = metrics_path(store)
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def _private(path: Path) -> RunDirectoryPrivate:
    owner = path.stat().st_uid
    return RunDirectoryPrivate(
        f"{path} belongs to the user {owner} alone, and this is {os.geteuid()}; run it as {owner}"
    )


class RunDirectoryKeeper:
    """Creates again those parts that belong to no single process, if they are removed while a server runs: the
    directory, the server's lock, and the directory of counters. Does nothing if the store itself was moved or deleted.

    Args:
        lock: the descriptor of the server's lock. If the lock file was removed, it becomes the descriptor of the new
            one.
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
            Whether files may be created in the directory: false while its content changes, because the whole store may
            be being deleted.
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
            self._seen, self._seen_at = found, time.monotonic()
        return time.monotonic() > self._seen_at + _SETTLED_SECONDS


def is_same_file(path: Path) -> Callable[[Path], bool]:
    """Return a function that tests whether a path still leads to the same file as this one does now."""
    known = path.stat()

    def is_same(other: Path) -> bool:
        try:
            return os.path.samestat(other.stat(), known)
        except FileNotFoundError:
            return False

    return is_same


def mend_lock(path: Path, held: int) -> bool:
    """Lock the file at a path if it is not the one that the descriptor has locked. The descriptor then refers to it.

    Returns:
        Whether that was necessary.

    Raises:
        BlockingIOError: another process locked it meanwhile.
        OSError: it cannot be created.
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
    """When a process started, in clock ticks since the machine did: field 22 of proc(5)'s stat. A date would change
    whenever the clock is set.

    Raises:
        FileNotFoundError, ProcessLookupError: it is gone.
    """
    # The second field is the command's name, in parentheses, and may hold anything.
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
