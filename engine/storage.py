"""Where the files of an export root lie: what a place must be able to do, and which place an address means.

Files have names relative to the root, with slashes: `doc/deltas/000000000001/manifest.json`.
"""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from engine.errors import SettingsInvalid

S3_SCHEME = "s3://"
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")


@dataclass(frozen=True)
class StoredFile:
    """A file by its name, with its size in bytes, and when it was last changed, in seconds since the epoch."""

    name: str
    size: int
    changed: float


class Storage(Protocol):
    """The place of one export root.

    What fails for reasons of the place itself is an OSError that names the file, or RootUnreadable; RootNotWritable
    where something is written.
    """

    listed_every_seconds: float
    """How often whoever waits for news may list what is there: a request that costs, in S3."""

    def __str__(self) -> str:
        """The root's address, as it is given to commands."""

    def where(self, name: str) -> str:
        """The address of a file, for messages."""

    def check_exists(self) -> None:
        """Raise NotPublished if there is no root, and PathsSwapped if there is a store."""

    def check_may_be_root(self) -> None:
        """Raise PathsSwapped if there is a store."""

    def directories(self, directory: str = "") -> list[str]:
        """The names of the directories directly in the root, or in one of its directories."""

    def has_directory(self, directory: str) -> bool:
        """Whether there is such a directory; in S3, whether there ever was a file in it."""

    def published(self, directory: str, document: str, *, since: str = "") -> list[str]:
        """The names of the directories directly in `directory` with the file `document`, from `since` on, sorted."""

    def files(self, directory: str) -> Iterator[StoredFile]:
        """All files below a directory; none if there is none."""

    def holds(self, name: str) -> bool:
        """Whether there is such a file."""

    def read(self, name: str) -> bytes:
        """A small document.

        Raises:
            FileNotFoundError: there is none.
            ManifestInvalid: what is there is no plain file inside the root.
        """

    def size(self, name: str) -> int:
        """The size of a file of rows in bytes; raises as `read` does, but FileDamaged."""

    def open(self, name: str) -> BinaryIO:
        """A file of rows, to be read anywhere in it; raises as `size` does."""

    def fetch(self, name: str, size: int) -> BinaryIO:
        """All of a file of rows, of `size` bytes, on this machine and with a descriptor; raises as `size` does."""

    def create(self, name: str, data: bytes) -> None:
        """Create a document, whole or not at all; raises FileExistsError if there is one."""

    def replace(self, name: str, data: bytes) -> None:
        """Create a document, or replace it whole."""

    def remove_directory(self, directory: str) -> None:
        """Remove a directory, if it is there, with all that is in it."""

    def remove(self, names: Iterable[str]) -> None:
        """Remove files; those that are gone already are no error."""


def is_address(text: str) -> bool:
    """Whether a text is an address with a scheme, such as s3://BUCKET, and not a path."""
    return _ADDRESS.match(text) is not None


def storage_at(address: str | os.PathLike[str]) -> Storage:
    """Return the storage at an address: `s3://BUCKET/PREFIX`, or the path of a directory.

    Raises:
        SettingsInvalid: an address in S3 that names no bucket, or boto3 is not installed; an address of another kind.
    """
    if isinstance(address, str) and address.startswith(S3_SCHEME):
        # It brings half a second of imports that a directory does not need.
        from engine.s3_storage import S3Storage

        return S3Storage(address)
    if isinstance(address, str) and is_address(address):
        raise SettingsInvalid(
            f"{address!r} is no export root: one is a directory, or s3://BUCKET/PREFIX in just this spelling; write "
            f"./{address} if it is the path of a directory"
        )
    from engine.directory_storage import DirectoryStorage

    return DirectoryStorage(Path(address))
