"""Versions of Feast's feature views: a Shoal store has the active one, and no other is written to it or read from it.

Feast keeps every definition that a view had as a version. Its own stores keep a table for each; in a Shoal store the
rows of all versions would be in one view, so that a version that was only staged (`feast apply --no-promote`) would
change what is served.
"""

import threading
from importlib.util import find_spec
from typing import Any

from feast import FeatureStore
from feast.errors import FeatureViewNotFoundException

from engine.errors import FeastVersionInactive
from loaders.feast_rows import schema_of

_FEAST_HAS_VERSIONS = find_spec("feast.version_utils") is not None
"""Older releases of Feast have none."""


class Versions:
    """What Feast's registry says of versions. Its methods may be called from several threads."""

    def __init__(self) -> None:
        self._registries: dict[tuple[str, str], Any] = {}
        self._opening = threading.Lock()

    def check_written(self, config: Any, view: Any) -> None:
        """Raises FeastVersionInactive unless rows of this feature view are rows of its active version."""
        if not _FEAST_HAS_VERSIONS:
            return
        number, active = _number(view), self._active(config, view.name, fresh=_are_versioned(config))
        if active is not None and number != _number(active):
            # What is cached may be older than what was applied meanwhile.
            active = self._active(config, view.name, fresh=True)
        if active is not None and number != _number(active):
            raise FeastVersionInactive(
                f"feature view {view.name!r}: rows of version {number} were to be written, but version "
                f"{_number(active)} is active, and a Shoal store has the active version alone; promote version "
                f"{number} first, or give the staged version a view of its own name"
            )

    def check_read(self, config: Any, view: Any) -> None:
        """Raises FeastVersionInactive if a version is asked for by its number that is not the active one."""
        number = _asked_version(view)
        if number is None:
            return
        active = self._active(config, view.name, fresh=True)
        if active is None or number != _number(active):
            raise FeastVersionInactive(
                f"feature view {view.name!r}: version {number} was asked for, but a Shoal store has the active version "
                f"alone, {'which is not known' if active is None else _number(active)}; ask for the view without a "
                f"version"
            )

    def active_definition(self, config: Any, view: Any) -> Any:
        """The definition that a store has to have once `view` is applied; None where `view` is staged, not promoted.

        Before it updates the online store, Feast gives a view that it promotes the next number. A view that is staged
        keeps the number that it had, and so does one that is as it was.
        """
        if not _FEAST_HAS_VERSIONS:
            return view
        pinned = self._pinned(config, view)
        if pinned is not None:
            return pinned
        active, number = self._active(config, view.name, fresh=True), view.current_version_number
        is_promoted = active is None or number not in (None, active.current_version_number or 0)
        return view if is_promoted or _have_same_features(view, active) else None

    def _pinned(self, config: Any, view: Any) -> Any:
        """The definition of the version to which a view goes back; None if it does not."""
        from feast.errors import FeatureViewVersionNotFound
        from feast.version_utils import parse_version

        is_latest, number = parse_version(getattr(view, "version", "latest"))
        if is_latest:
            return None
        try:
            return self._registry(config).get_feature_view_by_version(view.name, config.project, number)
        except FeatureViewVersionNotFound:
            return view

    def _active(self, config: Any, name: str, *, fresh: bool) -> Any:
        """The active definition of a view; None if the registry has none of this name."""
        try:
            return self._registry(config).get_any_feature_view(name, config.project, allow_cache=not fresh)
        except FeatureViewNotFoundException:
            return None

    def _registry(self, config: Any) -> Any:
        name = (str(config.repo_path), config.registry.path)
        with self._opening:
            if name not in self._registries:
                self._registries[name] = FeatureStore(repo_path=config.repo_path, config=config).registry
            return self._registries[name]


def _are_versioned(config: Any) -> bool:
    """Whether Feast can be asked to write a version that is not the active one."""
    return bool(getattr(config.registry, "enable_online_feature_view_versioning", False))


def _asked_version(view: Any) -> int | None:
    number: int | None = getattr(getattr(view, "projection", None), "version_tag", None)
    return number


def _number(view: Any) -> int:
    """The version of a definition; Feast leaves out the number of the first."""
    asked = _asked_version(view)
    return asked if asked is not None else getattr(view, "current_version_number", None) or 0


def _have_same_features(one: Any, other: Any) -> bool:
    first, second = schema_of(one), schema_of(other)
    return (first.join_keys, first.features) == (second.join_keys, second.features)
