"""Settings from files that may be replaced while the server runs, such as secrets and certificates."""

import logging
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Generic, TypeVar

from shoal.engine.base.errors import SettingsInvalid

log = logging.getLogger("shoal.supervisor")

Value = TypeVar("Value")


class ReloadableFiles(Generic[Value]):
    """A `value` that is read from files. `refresh` reads it again if the files have changed. If their new content is
    invalid, the old value stays.

    Changes are found by content, not by modification time: Kubernetes replaces a mounted secret by switching a link,
    other tools write in place, and a few kilobytes are read in microseconds.

    Raises:
        SettingsInvalid: the content of the files is invalid at the first reading.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[], Value]) -> None:
        self._paths = paths
        self._read = read
        self._seen = self._contents()
        self.value = read()

    def refresh(self) -> None:
        """Read the files again if they have changed. Call this about every second."""
        contents = self._contents()
        if contents == self._seen:
            return
        self._seen = contents
        names = " and ".join(map(str, self._paths))
        try:
            self.value = self._read()
        except SettingsInvalid as error:
            log.error("%s; the previous value stays in force", error)
        else:
            log.info("%s changed; the new value is in force", names)

    def _contents(self) -> list[bytes | None]:
        return [_digest(path) for path in self._paths]


def _digest(path: Path) -> bytes | None:
    """Return a digest of a file's content, so that a secret need not stay in memory. Return None if the file cannot be
    read."""
    try:
        return sha256(path.read_bytes()).digest()
    except OSError:
        return None  # The function `read` then reports the error.
