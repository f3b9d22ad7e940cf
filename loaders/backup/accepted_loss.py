"""Reset a store that lost data, at its owner's request.

No other code may treat a store that lost data as complete.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from shoal.engine.base.errors import START_ANEW, NothingLost, StoreDamaged, StoreNotFound
from shoal.engine.base.failpoints import reached
from shoal.engine.format.paths import check_may_be_store, has_generations, is_store, live_paths
from shoal.engine.format.progress import NAME, Begun, read_begun
from shoal.engine.root.directory_storage import sync_directory
from shoal.engine.store.disk import make_directory
from shoal.engine.store.environment import open_live, whole_live
from shoal.engine.store.open_version import read_version
from shoal.loaders.commit.store_writer import lock_store

LOST = "lost"
"""The directory in a store that receives the remaining files after a loss of data."""
_MOVED = ("live", "generations", NAME)
"""The files to move, in this order. The record of progress is the last one: until it is moved, the store counts as
damaged, not as new."""


@dataclass(frozen=True)
class AcceptedLoss:
    """An accepted loss: the progress that the store recorded, the damage found, and the new path of the remaining
    files."""

    recorded: Begun | None
    found: str
    moved_to: Path


def accept_loss(store: Path) -> AcceptedLoss:
    """Move the remaining files of a store aside, inside its directory. The next writer then starts an empty store.

    Raises:
        NothingLost: the store has everything that it recorded; if it has another fault, the message says what to do.
        StoreNotFound: there is no store.
        StoreLocked: another process is writing to the store.
        StoreUnreadable: the operating system cannot read the store now, so its state is unknown.
    """
    check_may_be_store(store)
    if not is_store(store) and not has_generations(store):
        raise StoreNotFound(f"{store} is not a Shoal store, so it has no data to lose; give the directory of a store")
    with lock_store(store, "stop it first: otherwise data that it holds or writes meanwhile is lost as well"):
        found = _what_is_wrong(store)
        recorded = read_begun(store)
        aside = store / LOST / datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        make_directory(aside)
        for name in _MOVED:
            if (store / name).exists():
                (store / name).rename(aside / name)
                sync_directory(aside)
                reached("loss.moved")
        sync_directory(store)
    return AcceptedLoss(recorded, found, aside)


def _what_is_wrong(store: Path) -> str:
    try:
        # Open the store as a writer does: a writer reads more of it than other processes do.
        version = read_version(store, open_live(store, writable=bool(live_paths(store))), None)
    except StoreDamaged as error:
        if (whole := whole_live(store)) is not None:
            newest = live_paths(store)[0]
            raise NothingLost(f"{whole} is complete, but {newest} hides it: move {newest} out of `live`") from error
        return str(error).removesuffix(f"; {START_ANEW}")
    raise NothingLost(
        f"{store} has everything that it recorded, up to version {version.id}; `shoal load` loads a damaged view again"
    )
