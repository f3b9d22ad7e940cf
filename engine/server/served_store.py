"""The store as a worker serves it: from before it exists, and for as long as it can be read."""

import logging
from pathlib import Path

from engine.errors import ProcessIdTaken, ShoalError, StoreNotFound
from engine.feature_store import FeatureStore
from engine.server.readiness import Readiness
from engine.version import StoreVersion

log = logging.getLogger("shoal.worker")


class ServedStore:
    """Opens the store as soon as there is one. `refresh` is to be called every second, lest a worker without requests
    hold on to an old version."""

    def __init__(self, path: Path, readiness: Readiness | None = None) -> None:
        self._path = path
        self._readiness = readiness
        self._store: FeatureStore | None = None
        self._failure: ShoalError = StoreNotFound(f"{path} is not open yet; try again in a second")

    def refresh(self) -> None:
        """Open the store if that was not possible yet, and move on to its newest version.

        Raises:
            ProcessIdTaken: another process has this process's id, so only a process with another id can open the store.
        """
        try:
            if self._store is None:
                self._store = FeatureStore.open(self._path)
                log.info("opened %s", self._path)
            self._store.version()
        except ProcessIdTaken:
            raise
        except ShoalError as error:
            # The writer's log and /ready say that a store is new.
            if str(error) != str(self._failure) and not isinstance(error, StoreNotFound):
                log.warning("%s", error)
            self._failure = error

    def open(self) -> FeatureStore:
        """The store, ready for lookups.

        Raises:
            StoreNotFound: there is none yet, or nothing was loaded into it.
            StoreDamaged: none of it can be read.
            StoreUnreadable: the system does not let it be read now.
        """
        if self._store is None:
            # All workers become ready at the same moment: /ready, answered by one, speaks for the others.
            self.refresh()
        if self._store is None:
            raise self._failure
        version = self._store.version()
        if not version.views:
            for name in version.damaged:
                version.view(name)  # Says what is wrong with it.
            for name, trouble in version.troubles.items():
                raise StoreNotFound(f"nothing was loaded into {self._path} yet: {name}: {trouble.message}")
            raise StoreNotFound(f"nothing was loaded into {self._path} yet; `shoal load` does")
        return self._store

    def ready(self) -> StoreVersion:
        """The newest version, if this server is to be sent requests; raises as `open` does, NotCaughtUp, and StoreMoved
        where what it serves is not what a restart would."""
        try:
            store = self.open()
        except StoreNotFound:
            version = self.version()
            is_told = version is not None and version.troubles
            if not is_told and self._readiness is not None and (why := self._readiness.why_empty()) is not None:
                raise StoreNotFound(f"nothing was loaded into {self._path} yet: {why}") from None
            raise
        store.check_in_place()
        version = store.version()
        if self._readiness is not None:
            self._readiness.check(version)
        return version

    def trouble(self) -> ShoalError | None:
        """Why the store as a whole cannot be read, or is no longer at its path; None if nothing is wrong with it."""
        if self._store is None:
            return None if isinstance(self._failure, StoreNotFound) else self._failure
        try:
            self._store.check_in_place()
        except ShoalError as error:
            return error
        return None

    def version(self) -> StoreVersion | None:
        """The newest version, if one can be read."""
        try:
            return self._store.version() if self._store else None
        except ShoalError:
            return None
