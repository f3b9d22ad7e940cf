"""Copy a store while it is written to, and make a store of such a copy.

    <backup>/backup.json                     what was backed up: each file with its size and checksum
    <backup>/begun                           how far the store is, see `engine.begun`
    <backup>/live/<number>/data.mdb          LMDB's own copy of the live environment, compacted
    <backup>/generations/<view>/<id>/data.mdb    each base that this copy's catalog names

A plain copy of a store that is written to has its files as of different moments, and is damaged. Bases are never
written again, so that they are linked where the file system allows it. A backup, and a restored store, are made aside
and renamed.
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

from engine.begun import begun_path, encode_file, read_begun
from engine.directory_storage import sync_directory
from engine.environment import (
    BACKUP,
    DATA,
    generation_path,
    make_directory,
    make_file,
    open_live,
    refusal_named,
    seal_copy,
    store_full_named,
)
from engine.errors import BackupInvalid, PathTaken, StoreDamaged
from engine.export_root import file_checksum
from engine.failpoints import reached
from engine.lmdb_file import number_copy
from engine.manifest import document_checksum
from engine.reading import read_version
from engine.version import StoreVersion
from loaders.verify import verify_store

MANIFEST = BACKUP
_TRIES = 20


def _inside(value: str) -> str:
    path = PurePosixPath(value)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(f"{value!r} leads out of the backup")
    return value


class BackedUpFile(BaseModel):
    """A file of a backup, by its path in it; the checksum is XXH3 (64 bits, hex)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: Annotated[str, AfterValidator(_inside)]
    bytes: int
    checksum: str


class BackupManifest(BaseModel):
    """What a backup contains: the store, its version, and all files."""

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
        """The size of all files."""
        return sum(file.bytes for file in self.files)


def back_up(store: Path, target: Path) -> BackupManifest:
    """Make a backup of a store, which may be written to meanwhile.

    Raises:
        PathTaken: something lies at the target.
        StoreNotFound, StoreDamaged, StoreUnreadable: the store, or one of its views, cannot be read whole.
        StoreFull: there is no room.
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
    """Make a store of a backup, which stays as it is.

    Raises:
        BackupInvalid: it is not a backup, or its files have changed.
        PathTaken: there is a store, or anything else, already.
        StoreFull: there is no room.
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
            raise BackupInvalid(f"{source} holds version {version.id}, {MANIFEST} says {manifest.version}")
        _publish(aside, store)
        reached("restore.published")
    return manifest


def read_manifest(source: Path) -> BackupManifest:
    """What a backup contains; raises BackupInvalid if it is none."""
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
    """Copy the live environment, and every base that the copy names. The store's writer may remove one meanwhile: then
    there is a newer version to copy."""
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
                shutil.rmtree(path)  # An earlier try took it over.
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
            # Sealing the copy is one more commit. The copy must not claim a later commit than the one that it holds:
            # in the place of a store that went on, it would then pass for that store.
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
    """Link a base, or copy what is written to later; a copy is on the disk when this returns."""
    make_directory(target.parent)
    if source.parts[-4:-3] == ("generations",):
        try:
            os.link(source, target)
            return
        except FileNotFoundError:
            raise
        except OSError:
            pass  # Another file system, or one without links.
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
    """An empty directory beside a target, which is renamed to the target at the end, or removed after an error.

    Raises:
        PathTaken: another process makes one for this target.
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
                raise PathTaken(
                    f"{target} is being made by another process; wait for it, or give another path"
                ) from None
            for left in aside.iterdir():  # By one that was killed.
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
