"""The decorator of kernels, and the machine code that they leave on disk for the processes to come.

Numba's own cache checks only the source file of the kernel itself, not the modules whose constants and functions the
machine code contains. Here the name of a file contains the kernel's fingerprint, which covers all of them. Machine code
of another release is therefore never read, and two releases may run side by side. A file holds one signature of one
kernel and is replaced as a whole, so processes that compile at the same time, or are killed, do no harm.
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

from engine.kernels.fingerprint import fingerprint

# Numba's types cover a part of it.
_Compiled: Any = compiler.CompileResult
_dumps: Any = serialize.dumps
_config: Any = config

log = logging.getLogger("shoal.kernels")

_SUFFIX = ".kernel"
_CHECKSUM_BYTES = hashlib.sha256().digest_size
_MOST_FILES = 512
"""A release has about 60 files for one kind of CPU, 5 MB. Those that were not used for longest make room for others."""


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function when it is first called with arguments of certain types, or read its machine code from disk.

    It runs without the interpreter's lock.
    """
    dispatcher: Any = njit(nogil=True)(function)
    dispatcher._cache = _KernelCache(dispatcher)
    return dispatcher


class _KernelCache(_Cache):
    """The machine code of one kernel on disk, as Numba asks for it: by signature and CPU.

    A kernel works without it. What cannot be read is compiled, and what cannot be written is warned of once.
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
                # As in Numba's own cache: who can write here can replace the machine code itself.
                return _Compiled._rebuild(target_context, *pickle.loads(payload))  # nosec B301
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep a compiled kernel in the first directory that takes it."""
        if data.library.has_dynamic_globals:
            # It contains an address of this process.
            return
        name, payload = self._file_name(sig, data.codegen), _dumps(data._reduce())
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
        """Do nothing: it is always enabled."""

    def disable(self) -> None:
        """Do nothing: it is always enabled."""

    def flush(self) -> None:
        """Do nothing: what is on disk is never out of date."""

    def _file_name(self, sig: Any, codegen: Any) -> str:
        function = self._dispatcher.py_func
        known_by = f"{fingerprint(self._dispatcher)} {sig} {codegen.magic_tuple()}"
        digest = hashlib.sha256(known_by.encode()).hexdigest()
        return f"{function.__module__}.{function.__qualname__}-{digest[:32]}{_SUFFIX}"


def _directories() -> Iterator[Path]:
    """Yield the directories for machine code: those that Numba would use, in its order, and then one for users without
    a home directory, as in containers."""
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
    """Whether only this user can write to a directory, which is created if missing. Code that is read from it is
    run."""
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not stat.S_IMODE(found.st_mode) & 0o077


def _read(path: Path) -> bytes | None:
    """Return a file's machine code, or None if there is none that is whole."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    checksum, payload = content[:_CHECKSUM_BYTES], content[_CHECKSUM_BYTES:]
    if hashlib.sha256(payload).digest() != checksum:
        return None
    with contextlib.suppress(OSError):
        # Its time says when it was last used.
        os.utime(path)
    return payload


def _write(path: Path, payload: bytes) -> None:
    """Write a file of machine code, or replace it. It is not synced: its checksum tells whether all of it is there."""
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
    """Remove the files that were not used for longest, where there are too many; unfinished ones count as well."""
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
        "the machine code of kernels cannot be kept (%s), so each process compiles them again, which takes "
        "about a minute; set NUMBA_CACHE_DIR to a directory that this process can write to",
        reasons,
    )
