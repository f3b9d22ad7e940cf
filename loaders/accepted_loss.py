"""Reset a store that lost data, at its owner's request.

No other code may treat a store that lost data as complete.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from engine.begun import NAME, Begun, read_begun
from engine.directory_storage import sync_directory
from engine.environment import (
    check_may_be_store,
    has_generations,
    is_store,
    live_paths,
    make_directory,
    open_live,
    whole_live,
)
from engine.errors import START_ANEW, NothingLost, StoreDamaged, StoreNotFound
from engine.failpoints import reached
from engine.reading import read_version
from loaders.store_writer import lock_store

LOST = "lost"
"""The directory in a store to which what is left of a loss is moved."""
_MOVED = ("live", "generations", NAME)
"""In this order: until the record has gone, the store counts as damaged and not as new."""


@dataclass(frozen=True)
class AcceptedLoss:
    """A loss: how far the store had been, what was found instead, and where what was left of it is now."""

    recorded: Begun | None
    found: str
    moved_to: Path


def accept_loss(store: Path) -> AcceptedLoss:
    """Move what is left of a store aside, inside its directory, so that the next writer begins it anew.

    Raises:
        NothingLost: it has all that it recorded; where it is unfit in another way, the message says what to do.
        StoreNotFound: there is no store.
        StoreLocked: it is being written to.
        StoreUnreadable: the operating system cannot read the store now, so its state is unknown.
    """
    check_may_be_store(store)
    if not is_store(store) and not has_generations(store):
        raise StoreNotFound(f"{store} is not a Shoal store; there is nothing that it could have lost")
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
        # As a writer does, who reads more of it than others.
        version = read_version(store, open_live(store, writable=bool(live_paths(store))), None)
    except StoreDamaged as error:
        if (whole := whole_live(store)) is not None:
            newest = live_paths(store)[0]
            raise NothingLost(f"{whole} is complete, but {newest} hides it: move {newest} out of `live`") from error
        return str(error).removesuffix(f"; {START_ANEW}")
    raise NothingLost(
        f"{store} has all that it recorded, up to version {version.id}; a view that is damaged is loaded again by "
        f"`shoal load`"
    )
