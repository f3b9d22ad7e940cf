"""Settings that come from files which somebody replaces while the server runs: secrets, certificates."""

import logging
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Generic, TypeVar

from engine.errors import SettingsInvalid

log = logging.getLogger("shoal.supervisor")

Value = TypeVar("Value")


class KeptFiles(Generic[Value]):
    """What files say: `value` is read anew by a `refresh` that finds them changed, and stays while what they say is
    invalid.

    The contents are compared, and not the times of change: Kubernetes replaces a mounted secret by a change of links,
    other tools write in place, and a few kilobytes are read in microseconds.

    Raises:
        SettingsInvalid: whatever `read` raises of the files as they are at first.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[], Value]) -> None:
        self._paths = paths
        self._read = read
        self._seen = self._contents()
        self.value = read()

    def refresh(self) -> None:
        """Take over what has changed; to be called every second or so."""
        contents = self._contents()
        if contents == self._seen:
            return
        self._seen = contents
        names = " and ".join(map(str, self._paths))
        try:
            self.value = self._read()
        except SettingsInvalid as error:
            log.error("%s; what was read before stays in force", error)
        else:
            log.info("%s changed, and holds from now on", names)

    def _contents(self) -> list[bytes | None]:
        return [_digest(path) for path in self._paths]


def _digest(path: Path) -> bytes | None:
    """Of what a file holds, since that may be a secret, and need not stay in memory."""
    try:
        return sha256(path.read_bytes()).digest()
    except OSError:
        return None  # What that means is for the reader to say.
