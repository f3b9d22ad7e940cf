"""Back up a store while it is written to, and restore a store from a backup.

    <backup>/backup.json                     the backup's manifest: each file with its size and checksum
    <backup>/begun                           the store's progress, see `shoal.engine.format.progress`
    <backup>/live/<number>/data.mdb          LMDB's own copy of the live environment, compacted
    <backup>/generations/<view>/<id>/data.mdb    each base that this copy's catalog names

If `cp` copies a store in use, it copies the files at different moments, so the copy is damaged. Bases are never
changed, so they are hard-linked if the file system allows it. A backup or a restored store is created in a temporary
directory next to its path, and then renamed.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import orjson
from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, ValidationError

from shoal.engine.base.errors import BackupInvalid, PathTaken, StoreDamaged
from shoal.engine.base.failpoints import reached
from shoal.engine.format.paths import BACKUP, DATA, generation_path
from shoal.engine.format.progress import begun_path, encode_file, read_begun
from shoal.engine.root.directory_storage import sync_directory
from shoal.engine.root.export_root import file_checksum
from shoal.engine.root.manifest import document_checksum
from shoal.engine.store.disk import make_directory, make_file, refusal_named, store_full_named
from shoal.engine.store.environment import open_live, seal_copy
from shoal.engine.store.lmdb_file import number_copy
from shoal.engine.store.open_version import read_version
from shoal.engine.store.version import StoreVersion
from shoal.loaders.backup.verify import verify_store

MANIFEST = BACKUP
_TRIES = 20


def _inside(value: str) -> str:
    path = PurePosixPath(value)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(f"{value!r} is not a path inside the backup")
    return value


class BackedUpFile(BaseModel):
    """A file of a backup. Its path is relative to the backup; the checksum is XXH3 (64 bits, hex)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: Annotated[str, AfterValidator(_inside)]
    bytes: int
    checksum: str


class BackupManifest(BaseModel):
    """The contents of a backup: the store's id and version, and all files."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format_version: Literal[1] = 1
    store_id: str
    version: int
    created_at: AwareDatetime
    shard: str | None
    views: tuple[str, ...]
    files: tuple[BackedUpFile, ...]

    @property
    def bytes(self) -> int:
        """The total size of all files."""
        return sum(file.bytes for file in self.files)


def back_up(store: Path, target: Path) -> BackupManifest:
    """Back up a store. Another process may write to the store meanwhile.

    Raises:
        PathTaken: the target exists already.
        StoreNotFound, StoreDamaged, StoreUnreadable: the store, or one of its views, cannot be read completely.
        StoreFull: the disk is full.
    """
    _check_free(target, may_be_empty=False)
    open_live(store)
    with _made_aside(target) as aside:
        version = _copy_consistently(store, aside)
        for checked in verify_store(aside):
            if checked.problem is not None:
                raise StoreDamaged(f"{store} cannot be backed up: {checked.what}: {checked.problem}")
        begun = read_begun(aside)
        assert begun is not None
        shutil.rmtree(aside / "run", ignore_errors=True)
        manifest = BackupManifest(
            store_id=begun.store_id.hex(),
            version=version.id,
            created_at=datetime.now(UTC),
            shard=version.store.shard,
            views=tuple(version.names),
            files=tuple(_described(aside, path) for path in _files(aside)),
        )
        _write(aside / MANIFEST, _sealed(manifest))
        _publish(aside, target)
        reached("backup.published")
    return manifest


def restore(source: Path, store: Path) -> BackupManifest:
    """Create a store from a backup. The backup is not changed.

    Raises:
        BackupInvalid: the source is not a backup, or its files have changed.
        PathTaken: the store's path exists already and is not an empty directory.
        StoreFull: the disk is full.
    """
    manifest = read_manifest(source)
    _check_free(store, may_be_empty=True)
    with _made_aside(store) as aside:
        for file in manifest.files:
            if not (source / file.path).is_file():
                raise BackupInvalid(f"{source / file.path} is missing; take another backup")
            _take_over(source / file.path, aside / file.path)
            found = _described(aside, aside / file.path)
            if found != file:
                raise BackupInvalid(
                    f"{source / file.path} has {found.bytes} bytes and the checksum {found.checksum}; {MANIFEST} says "
                    f"{file.bytes} and {file.checksum}; take another backup"
                )
        version = read_version(aside, open_live(aside), None)
        if version.id != manifest.version or version.damaged:
            raise BackupInvalid(f"{source} holds version {version.id}, but {MANIFEST} says {manifest.version}")
        _publish(aside, store)
        reached("restore.published")
    return manifest


def read_manifest(source: Path) -> BackupManifest:
    """Return the manifest of a backup. Raise BackupInvalid if the source is not a backup."""
    try:
        document = orjson.loads((source / MANIFEST).read_bytes())
        checksum = document.pop("checksum")
        manifest = BackupManifest.model_validate(document)
    except (OSError, ValueError, LookupError, AttributeError, TypeError, ValidationError) as error:
        raise BackupInvalid(f"{source} is not a backup made by `shoal backup`: {MANIFEST}: {error}") from error
    if checksum != document_checksum(document):
        raise BackupInvalid(f"{source / MANIFEST} has changed since it was written; take another backup")
    return manifest


# --- files ------------------------------------------------------------------------------------------------------


def _copy_consistently(store: Path, aside: Path) -> StoreVersion:
    """Copy the live environment and every base that the copy names, and return the copied version.

    The store's writer may remove one of these bases meanwhile. Then there is a newer version, and the copy starts over.
    """
    for _ in range(_TRIES):
        shutil.rmtree(aside / "live", ignore_errors=True)
        _copy_live(store, aside)
        version = read_version(aside, open_live(aside), None)
        records = [(name, record) for name in version.names if (record := version.record(name)) is not None]
        named = {(name, base.id) for name, record in records for base in (record.base, *record.kept)}
        try:
            for view, generation_id in named:
                made = generation_path(aside, view, generation_id) / DATA
                if not made.exists():
                    _take_over(generation_path(store, view, generation_id) / DATA, made)
        except FileNotFoundError:
            continue
        for path in aside.glob("generations/*/*"):
            if (path.parent.name, path.name) not in named:
                shutil.rmtree(path)  # An earlier attempt copied this base.
        return read_version(aside, open_live(aside), None)
    raise StoreDamaged(
        f"{store}: the catalog names base generations that are missing; run `shoal verify {store}` for the list"
    )


def _copy_live(store: Path, aside: Path) -> None:
    live = open_live(store)
    path = aside / "live" / str(live.number)
    with store_full_named(path):
        make_directory(path)
        make_file(path / DATA)
        with (path / DATA).open("r+b", buffering=0) as file:
            # `seal_copy` adds a commit. The number of that commit must not be higher than the number of the copied
            # commit. Otherwise, if the copy took the place of its original, it could pass for a newer state, and hide
            # lost commits.
            before = live.last_transaction()
            live.env.copyfd(file.fileno(), compact=True)
            number_copy(file, max(1, before - 1 if before % 2 == 0 else before - 2))
        seal_copy(path)
        with (path / DATA).open("rb") as file:
            os.fsync(file.fileno())
        begun_path(aside).unlink(missing_ok=True)
        progress = open_live(aside).progress()
        assert progress is not None
        _write(begun_path(aside), encode_file(progress))


def _take_over(source: Path, target: Path) -> None:
    """Hard-link a base, or copy any other file. A copy is synced to the disk."""
    make_directory(target.parent)
    if source.parts[-4:-3] == ("generations",):
        try:
            os.link(source, target)
            return
        except FileNotFoundError:
            raise
        except OSError:
            pass  # The target is on another file system, or the file system has no hard links.
    with store_full_named(target):
        make_file(target)
        with source.open("rb") as original, target.open("r+b") as copy:
            shutil.copyfileobj(original, copy, 1 << 20)
            copy.flush()
            os.fsync(copy.fileno())


def _files(directory: Path) -> Sequence[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file() and path.name != "lock.mdb")


def _described(directory: Path, path: Path) -> BackedUpFile:
    name = path.relative_to(directory).as_posix()
    return BackedUpFile(path=name, bytes=path.stat().st_size, checksum=file_checksum(path))


def _write(path: Path, content: bytes) -> None:
    make_file(path)
    with path.open("r+b") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sealed(manifest: BackupManifest) -> bytes:
    document = manifest.model_dump(mode="json")
    return orjson.dumps(document | {"checksum": document_checksum(document)}, option=orjson.OPT_INDENT_2)


# --- publication --------------------------------------------------------------------------------------------------


def _check_free(target: Path, *, may_be_empty: bool) -> None:
    if target.exists() and not (may_be_empty and target.is_dir() and not any(target.iterdir())):
        raise PathTaken(f"{target} exists already; give another path, or move it away")


@contextmanager
def _made_aside(target: Path) -> Iterator[Path]:
    """Create an empty directory next to a target. Remove the directory at the end, unless it was renamed to the target.

    Raises:
        PathTaken: another process is creating this target.
        StoreNotWritable: the directory cannot be created.
    """
    target = target.absolute()
    aside = target.with_name(f".{target.name}.making")
    with store_full_named(target):
        with refusal_named(target):
            make_directory(aside)
            lock = os.open(aside, os.O_RDONLY)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise PathTaken(f"another process is creating {target}; wait for it, or give another path") from None
            for left in aside.iterdir():  # A killed process left these files.
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            try:
                yield aside
            finally:
                shutil.rmtree(aside, ignore_errors=True)
        finally:
            os.close(lock)


def _publish(aside: Path, target: Path) -> None:
    target = target.absolute()
    for lock in aside.glob("live/*/lock.mdb"):
        lock.unlink()
    for path in sorted(aside.rglob("*"), reverse=True):
        if path.is_dir():
            sync_directory(path)
    sync_directory(aside)
    reached("backup.aside" if (aside / MANIFEST).exists() else "restore.aside")
    try:
        os.rename(aside, target)
    except OSError as error:
        raise PathTaken(
            f"{target} cannot be created: {error}; give an empty or new path on a local file system"
        ) from error
    sync_directory(target.parent)
