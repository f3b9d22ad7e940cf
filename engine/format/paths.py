"""The paths of a store's parts, and how to tell a store, an export root and a backup apart."""

from pathlib import Path

from shoal.engine.base.errors import (
    PathsSwapped,
    RootUnreadable,
    StoreUnreadable,
)
from shoal.engine.format.progress import begun_path

_FIRST = "1"

_PUBLISHED = ("*/deltas/*/manifest.json", "services.json", "dropped.json")
"""Files that identify an export root; a store has no such files. `shoal.engine.root.export_root` writes them."""

BACKUP = "backup.json"
"""The file that identifies a backup: see `shoal.loaders.backup.backup`."""

DATA = "data.mdb"
"""The file with an environment's pages."""

LOCK = "lock.mdb"
"""The file with an environment's locks and its reader table."""


def live_paths(store: Path) -> list[Path]:
    """Return the paths of a store's live environments, newest first. Only the newest is in use. A replaced environment
    stays in the list until it is removed.

    Raises:
        StoreUnreadable: the operating system currently refuses to read the directory.
    """
    directory = store / "live"
    try:
        found = [entry for entry in directory.iterdir() if entry.name.isdecimal()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StoreUnreadable(f"{directory} cannot be read now: {error}") from error
    return sorted(found, key=lambda entry: int(entry.name), reverse=True)


def live_path(store: Path) -> Path:
    """Return the path of a store's live environment. If the store has none yet, return the path for its first live
    environment."""
    return next(iter(live_paths(store)), store / "live" / _FIRST)


def generations_path(store: Path, view: str) -> Path:
    """Return the directory of a view's base generations."""
    return store / "generations" / view


def generation_path(store: Path, view: str, generation_id: str) -> Path:
    """Return the directory of one base generation of a view."""
    return generations_path(store, view) / generation_id


def has_generations(store: Path) -> bool:
    """Return whether a store has a completed base of any view."""
    return any(not entry.name.startswith(".") for entry in (store / "generations").glob("*/*"))


def is_store(store: Path) -> bool:
    """Return whether a directory is a store, even if the store has lost all or a part of its data."""
    try:
        return begun_path(store).is_file() or bool(live_paths(store))
    except OSError as error:
        raise StoreUnreadable(f"{store} cannot be read now: {error}") from error


def is_root(directory: Path) -> bool:
    """Return whether a directory is an export root, which means that it contains published files."""
    return any(any(directory.glob(pattern)) for pattern in _PUBLISHED)


def check_may_be_store(directory: Path) -> None:
    """Raise PathsSwapped if a directory is an export root or a backup, which must not be used as a store."""
    if is_root(directory):
        raise _is_a_root(directory)
    if (directory / BACKUP).is_file():
        raise PathsSwapped(
            f"{directory} is a backup, not a store: `shoal restore --from {directory} --to STORE` makes a store from it"
        )


def check_may_be_root(directory: Path) -> None:
    """Check that a directory is not a store, before it is used as an export root.

    Raises:
        PathsSwapped: the directory is a store.
        RootUnreadable: the operating system currently refuses to read the directory.
    """
    try:
        found = is_store(directory)
    except StoreUnreadable as error:
        raise RootUnreadable(f"{error}; check its file system, and try again") from error
    if found:
        raise PathsSwapped(
            f"{directory} is a store, not an export root: give the directory that `shoal export` publishes to; are the "
            f"store and the root swapped?"
        )


def _is_a_root(directory: Path) -> PathsSwapped:
    return PathsSwapped(
        f"{directory} is an export root, not a store: give another directory as the store; are the store and the root "
        f"swapped?"
    )
