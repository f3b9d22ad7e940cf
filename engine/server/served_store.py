"""The store that a worker serves. It need not exist when the worker starts."""

import logging
from pathlib import Path

from shoal.engine.base.errors import ProcessIdTaken, ShoalError, StoreNotFound
from shoal.engine.feature_store import FeatureStore
from shoal.engine.server.readiness import Readiness
from shoal.engine.store.version import StoreVersion

log = logging.getLogger("shoal.worker")


class ServedStore:
    """The store, opened as soon as it exists. Call `refresh` every second, so that a worker without requests does not
    hold an old version."""

    def __init__(self, path: Path, readiness: Readiness | None = None) -> None:
        self._path = path
        self._readiness = readiness
        self._store: FeatureStore | None = None
        self._failure: ShoalError = StoreNotFound(f"{path} is not open yet; try again in a second")

    def refresh(self) -> None:
        """Open the store if it is not open yet, and move on to its newest version.

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
            # Do not log that the store does not exist yet: the writer's log and /ready report that.
            if str(error) != str(self._failure) and not isinstance(error, StoreNotFound):
                log.warning("%s", error)
            self._failure = error

    def open(self) -> FeatureStore:
        """Return the store, ready for lookups.

        Raises:
            StoreNotFound: the store does not exist yet, or nothing was loaded into it.
            StoreDamaged: no part of the store can be read.
            StoreUnreadable: the operating system does not allow the store to be read now.
        """
        if self._store is None:
            # Try again now, so that all workers become ready at the same time. The answer of one worker to /ready must
            # be true for all workers.
            self.refresh()
        if self._store is None:
            raise self._failure
        version = self._store.version()
        if not version.views:
            for name in version.damaged:
                version.view(name)  # Raises the error of the damaged view.
            for name, trouble in version.troubles.items():
                raise StoreNotFound(f"nothing was loaded into {self._path} yet: {name}: {trouble.message}")
            raise StoreNotFound(f"nothing was loaded into {self._path} yet; run `shoal load`")
        return self._store

    def ready(self) -> StoreVersion:
        """Return the newest version if this server is ready for requests; otherwise raise the errors of `open`, or
        NotCaughtUp. Raise StoreMoved if the server would serve other files after a restart."""
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
        """Return the error if the whole store cannot be read, or is no longer at its path; else None."""
        if self._store is None:
            return None if isinstance(self._failure, StoreNotFound) else self._failure
        try:
            self._store.check_in_place()
        except ShoalError as error:
            return error
        return None

    def version(self) -> StoreVersion | None:
        """Return the newest version; None if it cannot be read."""
        try:
            return self._store.version() if self._store else None
        except ShoalError:
            return None
