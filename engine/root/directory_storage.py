"""An export root in a directory. Exporters and nodes must all mount the file system of the directory."""

import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from shoal.engine.base.errors import FileDamaged, ManifestInvalid, NotPublished, ShoalError
from shoal.engine.base.failpoints import reached
from shoal.engine.format.paths import check_may_be_root
from shoal.engine.root.storage import StoredFile


class DirectoryStorage:
    """The `Storage` of a directory. It reads only plain files inside the directory, and follows no link that leads out
    of the directory."""

    listed_every_seconds = 0.0

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    def __str__(self) -> str:
        return str(self.path)

    def where(self, name: str) -> str:
        return str(self.path / name)

    def check_exists(self) -> None:
        self.check_may_be_root()
        if self.path.exists() and not self.path.is_dir():
            raise NotPublished(f"export root {self.path} is not a directory")
        if not self.path.is_dir():
            raise NotPublished(f"export root {self.path} does not exist; `shoal export --to {self.path}` creates it")

    def check_may_be_root(self) -> None:
        check_may_be_root(self.path)

    def directories(self, directory: str = "") -> list[str]:
        path = self.path / directory
        return [entry.name for entry in path.iterdir() if entry.is_dir()] if path.is_dir() else []

    def has_directory(self, directory: str) -> bool:
        return (self.path / directory).is_dir()

    def published(self, directory: str, document: str, *, since: str = "") -> list[str]:
        path = self.path / directory
        if not path.is_dir():
            return []
        return sorted(entry.name for entry in path.iterdir() if entry.name >= since and (entry / document).is_file())

    def files(self, directory: str) -> Iterator[StoredFile]:
        for path in (self.path / directory).rglob("*"):
            if path.is_file():
                try:
                    status = path.stat()
                except FileNotFoundError:
                    continue  # Another process has renamed or removed it, such as an unfinished document.
                yield StoredFile(str(path.relative_to(self.path)), status.st_size, status.st_mtime)

    def holds(self, name: str) -> bool:
        return (self.path / name).is_file()

    def read(self, name: str) -> bytes:
        return self._contained(name, ManifestInvalid).read_bytes()

    def size(self, name: str) -> int:
        return self._contained(name, FileDamaged).stat().st_size

    def open(self, name: str) -> BinaryIO:
        return self._contained(name, FileDamaged).open("rb")

    def fetch(self, name: str, size: int) -> BinaryIO:
        return self.open(name)

    def create(self, name: str, data: bytes) -> None:
        _create_exclusively(self.path / name, data)

    def replace(self, name: str, data: bytes) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(_write_aside(path, data), path)
        sync_directory(path.parent)

    def remove_directory(self, directory: str) -> None:
        shutil.rmtree(self.path / directory, ignore_errors=True)

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            (self.path / name).unlink(missing_ok=True)

    def _contained(self, name: str, refusal: type[ShoalError]) -> Path:
        """Return the path of a file, after a check that the file is a plain file inside the root, or does not exist."""
        path = self.path / name
        # For a link to itself, Path.resolve raises an error, but os.path.realpath does not. The error then comes when
        # the path is opened.
        leads_to = Path(os.path.realpath(path))
        if not leads_to.is_relative_to(self.path.resolve()):
            raise refusal(f"{path} leads to {leads_to}, outside the export root; publish the file itself")
        if path.exists() and not path.is_file():
            # Reading a pipe would block until a process writes to it.
            raise refusal(f"{path} cannot be read: it is not a plain file; publish it again")
        return path


def sync_directory(path: Path) -> None:
    """Make new and moved names in a directory survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_aside(path: Path, data: bytes) -> Path:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with temporary.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    return temporary


def _create_exclusively(path: Path, data: bytes) -> None:
    """Create a file whole or not at all; raise FileExistsError if the file exists. The creation of a hard link is
    atomic and exclusive."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _write_aside(path, data)
    reached("export.manifest-aside")
    try:
        os.link(temporary, path)
    except FileNotFoundError:
        # Meanwhile, another exporter published the file, and removed this temporary file because no manifest lists it.
        if path.exists():
            raise FileExistsError(path) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)
    sync_directory(path.parent.parent)
