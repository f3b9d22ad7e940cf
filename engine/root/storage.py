"""The storage interface of an export root. The implementations are a directory and S3.

The name of a file is its path relative to the root, with slashes: `doc/deltas/000000000001/manifest.json`.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Protocol

S3_SCHEME = "s3://"
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")


@dataclass(frozen=True)
class StoredFile:
    """The name of a file, its size in bytes, and the time of its last change in seconds since the epoch."""

    name: str
    size: int
    changed: float


class Storage(Protocol):
    """The storage of one export root.

    If the storage itself fails, methods raise RootUnreadable or an OSError with the name of the file; methods that
    write raise RootNotWritable.
    """

    listed_every_seconds: float
    """A reader that waits for new entries lists a log at most once in this number of seconds. In S3, a list request
    costs money."""

    def __str__(self) -> str:
        """Return the root's address, in the form that commands accept."""

    def where(self, name: str) -> str:
        """Return the address of a file, for messages."""

    def check_exists(self) -> None:
        """Raise NotPublished if the root does not exist, and PathsSwapped if the address is a store."""

    def check_may_be_root(self) -> None:
        """Raise PathsSwapped if the address is a store."""

    def directories(self, directory: str = "") -> list[str]:
        """Return the names of the directories directly in the root, or directly in one of its directories."""

    def has_directory(self, directory: str) -> bool:
        """Return whether a directory exists. In S3, return whether this `Storage` ever found a file in the
        directory."""

    def published(self, directory: str, document: str, *, since: str = "") -> list[str]:
        """Return the sorted names of the directories that are directly in `directory` and contain the file `document`.
        Leave out names before `since`."""

    def files(self, directory: str) -> Iterator[StoredFile]:
        """Yield all files below a directory. Yield nothing if the directory does not exist."""

    def holds(self, name: str) -> bool:
        """Return whether a file exists."""

    def read(self, name: str) -> bytes:
        """Read a small document.

        Raises:
            FileNotFoundError: the document does not exist.
            ManifestInvalid: the name is not a plain file inside the root.
        """

    def size(self, name: str) -> int:
        """Return the size of a Parquet file in bytes; raise as `read` does, but raise FileDamaged in place of
        ManifestInvalid."""

    def open(self, name: str) -> BinaryIO:
        """Open a Parquet file for reads at any position; raise as `size` does."""

    def fetch(self, name: str, size: int) -> BinaryIO:
        """Return a whole Parquet file of `size` bytes as a local file with a descriptor; raise as `size` does."""

    def create(self, name: str, data: bytes) -> None:
        """Create a document, whole or not at all; raise FileExistsError if the document exists."""

    def replace(self, name: str, data: bytes) -> None:
        """Create a document, or replace it atomically."""

    def remove_directory(self, directory: str) -> None:
        """Remove a directory and all its content, if it exists."""

    def remove(self, names: Iterable[str]) -> None:
        """Remove files. A file that does not exist is not an error."""


def is_address(text: str) -> bool:
    """Return whether a text is an address with a scheme, such as s3://BUCKET, and not a path."""
    return _ADDRESS.match(text) is not None
