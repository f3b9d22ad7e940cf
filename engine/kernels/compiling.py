"""The decorator for kernels, and the cache on disk that keeps the kernels' machine code for later processes.

Numba's own cache checks only the source file of the kernel itself. But machine code also contains constants and
functions of other modules. In this cache, the name of a file contains the kernel's fingerprint, which covers all these
modules. A process therefore never reads machine code of another release, and two releases may run side by side. A file
contains one signature of one kernel and is replaced as a whole. So processes may compile at the same time, and may be
killed, without harm.
"""

import contextlib
import hashlib
import logging
import os
import pickle  # nosec B403
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from numba import njit
from numba.core import compiler, config, serialize
from numba.core.caching import _Cache

from shoal.engine.kernels.fingerprint import fingerprint

# Numba's type hints cover these objects only in part.
_Compiled: Any = compiler.CompileResult
_dumps: Any = serialize.dumps
_config: Any = config

log = logging.getLogger("shoal.kernels")

_SUFFIX = ".kernel"
_CHECKSUM_BYTES = hashlib.sha256().digest_size
_MOST_FILES = 512
"""The maximum number of files in a directory. A release has about 60 files (5 MB) for one kind of CPU. If there are
more, the least recently used files are removed."""


def kernel(function: Callable[..., Any]) -> Any:
    """Turn a function into a kernel, which runs without Python's global interpreter lock (GIL).

    At the first call with new argument types, the function is compiled, or its machine code is read from disk.
    """
    dispatcher: Any = njit(nogil=True)(function)
    dispatcher._cache = _KernelCache(dispatcher)
    return dispatcher


class _KernelCache(_Cache):
    """The machine code of one kernel on disk, as a Numba cache. Each entry is for one signature and one CPU type.

    A kernel works without this cache. If its file cannot be read, the kernel is compiled. If its file cannot be
    written, a warning is logged once.
    """

    def __init__(self, dispatcher: Any) -> None:
        self._dispatcher = dispatcher

    @property
    def cache_path(self) -> str:
        return str(next(_directories()))

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return the compiled kernel, or None if it is not on disk."""
        target_context.refresh()
        name = self._file_name(sig, target_context.codegen())
        for directory in _directories():
            payload = _read(directory / name)
            if payload is not None:
                # This is as safe as Numba's own cache: anyone who can write here can replace the machine code itself.
                return _Compiled._rebuild(target_context, *pickle.loads(payload))  # nosec B301
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Write a compiled kernel to the first directory that accepts the file."""
        if data.library.has_dynamic_globals:
            # The code contains an address of this process.
            return
        name = self._file_name(sig, data.codegen)
        payload = _dumps(data._reduce())
        errors = []
        for directory in _directories():
            try:
                _write(directory / name, payload)
                _make_room(directory, name)
                return
            except OSError as error:
                errors.append(f"{directory}: {error.strerror}")
        _warn("; ".join(errors))

    def enable(self) -> None:
        """Do nothing: the cache is always enabled."""

    def disable(self) -> None:
        """Do nothing: the cache is always enabled."""

    def flush(self) -> None:
        """Do nothing: files on disk are never out of date."""

    def _file_name(self, sig: Any, codegen: Any) -> str:
        function = self._dispatcher.py_func
        known_by = f"{fingerprint(self._dispatcher)} {sig} {codegen.magic_tuple()}"
        digest = hashlib.sha256(known_by.encode()).hexdigest()
        return f"{function.__module__}.{function.__qualname__}-{digest[:32]}{_SUFFIX}"


def _directories() -> Iterator[Path]:
    """Yield the directories for machine code: first the directories that Numba uses, in Numba's order, and then a
    directory for users without a home directory, as in containers."""
    if _config.CACHE_DIR:
        yield Path(_config.CACHE_DIR) / "shoal"
    yield Path(__file__).parent / "__pycache__"
    of_user = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"))
    if of_user.is_absolute():
        yield of_user / "shoal" / "kernels"
    temporary = Path(tempfile.gettempdir()) / f"shoal-kernels-{os.geteuid()}"
    if _is_private(temporary):
        yield temporary


def _is_private(path: Path) -> bool:
    """Return whether only this user has access to a directory; create the directory if it is missing. The access
    matters because this process runs the machine code in the directory."""
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not stat.S_IMODE(found.st_mode) & 0o077


def _read(path: Path) -> bytes | None:
    """Return a file's machine code, or None if the file is missing or damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    checksum = content[:_CHECKSUM_BYTES]
    payload = content[_CHECKSUM_BYTES:]
    if hashlib.sha256(payload).digest() != checksum:
        return None
    with contextlib.suppress(OSError):
        # The file's modification time is the time of its last use.
        os.utime(path)
    return payload


def _write(path: Path, payload: bytes) -> None:
    """Write or replace a file of machine code. The file is not synced: its checksum shows whether it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        unfinished.write_bytes(hashlib.sha256(payload).digest() + payload)
        unfinished.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


def _make_room(directory: Path, written: str) -> None:
    """Remove the least recently used files if there are too many; unfinished files count as well."""
    found = []
    for entry in os.scandir(directory):
        if _SUFFIX in entry.name and entry.name != written:
            with contextlib.suppress(OSError):
                found.append((entry.stat().st_mtime, entry.path))
    for _, path in sorted(found)[: -_MOST_FILES + 1]:
        with contextlib.suppress(OSError):
            os.unlink(path)


@cache
def _warn(reasons: str) -> None:
    log.warning(
        "the machine code of kernels cannot be written to disk (%s), so each process compiles the kernels again, which "
        "takes about a minute; set NUMBA_CACHE_DIR to a directory that this process can write to",
        reasons,
    )
