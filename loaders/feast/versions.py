"""Versions of Feast's feature views: a Shoal store holds only the active version, and refuses all others.

Feast keeps every definition of a view as a version, and its own stores keep one table per version. In a Shoal store,
the rows of all versions would be in one view. A version that is only staged (`feast apply --no-promote`) would then
change the served rows.
"""

import threading
from importlib.util import find_spec
from typing import Any

from feast import FeatureStore
from feast.errors import FeatureViewNotFoundException

from shoal.engine.base.errors import FeastVersionInactive
from shoal.loaders.feast.rows import schema_of

_FEAST_HAS_VERSIONS = find_spec("feast.version_utils") is not None
"""Whether this release of Feast has versions; older releases do not."""


class Versions:
    """The versions of feature views in Feast's registry. The methods may be called from several threads."""

    def __init__(self) -> None:
        self._registries: dict[tuple[str, str], Any] = {}
        self._opening = threading.Lock()

    def check_written(self, config: Any, view: Any) -> None:
        """Raise FeastVersionInactive if rows of this feature view belong to a version that is not active."""
        if not _FEAST_HAS_VERSIONS:
            return
        number = _number(view)
        active = self._active(config, view.name, fresh=_are_versioned(config))
        if active is not None and number != _number(active):
            # The cached registry may be older than the last `feast apply`, so read the registry again.
            active = self._active(config, view.name, fresh=True)
        if active is not None and number != _number(active):
            raise FeastVersionInactive(
                f"feature view {view.name!r}: rows of version {number} cannot be written, because version "
                f"{_number(active)} is active, and a Shoal store holds only the active version; promote version "
                f"{number} first, or give the staged version a view with another name"
            )

    def check_read(self, config: Any, view: Any) -> None:
        """Raise FeastVersionInactive if the request names a version by number, and that version is not active."""
        number = _asked_version(view)
        if number is None:
            return
        active = self._active(config, view.name, fresh=True)
        if active is None or number != _number(active):
            raise FeastVersionInactive(
                f"feature view {view.name!r}: version {number} was requested, but a Shoal store holds only the active "
                f"version, {'which is not known' if active is None else _number(active)}; request the view without a "
                f"version"
            )

    def active_definition(self, config: Any, view: Any) -> Any:
        """Return the definition that the store must have after `view` is applied, or None if `view` is only staged.

        Before Feast updates the online store, it gives a promoted view the next version number. A staged view keeps its
        number, and so does an unchanged view.
        """
        if not _FEAST_HAS_VERSIONS:
            return view
        pinned = self._pinned(config, view)
        if pinned is not None:
            return pinned
        active = self._active(config, view.name, fresh=True)
        number = view.current_version_number
        is_promoted = active is None or number not in (None, active.current_version_number or 0)
        return view if is_promoted or _have_same_features(view, active) else None

    def _pinned(self, config: Any, view: Any) -> Any:
        """Return the definition of the older version that a view is pinned to, or None if the view is not pinned."""
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
        """Return the active definition of a view, or None if the registry has no view of this name."""
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
    """Return whether Feast may be asked to write a version that is not active."""
    return bool(getattr(config.registry, "enable_online_feature_view_versioning", False))


def _asked_version(view: Any) -> int | None:
    number: int | None = getattr(getattr(view, "projection", None), "version_tag", None)
    return number


def _number(view: Any) -> int:
    """Return the version number of a definition. Feast leaves out the number of the first version."""
    asked = _asked_version(view)
    return asked if asked is not None else getattr(view, "current_version_number", None) or 0


def _have_same_features(one: Any, other: Any) -> bool:
    first = schema_of(one)
    second = schema_of(other)
    return (first.join_keys, first.features) == (second.join_keys, second.features)
