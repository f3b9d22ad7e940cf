"""A Feast repository, for the commands that compare with it or convert it.

Feast is not a dependency of Shoal. Among the modules of the commands, only this one imports Feast, and only when a
command needs Feast. This module turns all errors of Feast into FeastFailed. Feast has no type annotations to check
against, so its objects are `Any`.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from shoal.engine.base.errors import FeastFailed

CONFIGURATION = "feature_store.yaml"


def open_repository(location: str, project: str | None = None) -> Any:
    """Open a Feast repository; return a `feast.FeatureStore`.

    Args:
        location: a directory with a feature_store.yaml, the path of a feature_store.yaml, or a registry (a file or an
            address).
        project: the project in the registry; needed only for a registry with several projects.

    Raises:
        FeastFailed: Feast is not installed, or cannot open the repository.
    """
    path = Path(location)
    if path.is_dir() and not (path / CONFIGURATION).is_file():
        raise FeastFailed(f"{location} has no {CONFIGURATION}; give a Feast repository, or the path of a registry")
    if "://" not in location and not path.exists():
        raise FeastFailed(f"{location} does not exist; give a Feast repository, or the path of a registry")
    feast = _feast()
    with failing(f"Feast cannot open {location}"):
        if path.is_dir():
            store = feast.FeatureStore(repo_path=location)
        elif path.suffix in (".yaml", ".yml"):
            store = feast.FeatureStore(repo_path=str(path.parent), fs_yaml_file=path.absolute())
        else:
            return _open_registry(feast, location, project)
    if project not in (None, store.project):
        raise FeastFailed(f"{location} belongs to project {store.project!r}, not {project!r}; leave out --project")
    return store


@contextmanager
def failing(what: str) -> Iterator[None]:
    """Turn any exception of Feast into a FeastFailed with a message that begins with `what`."""
    try:
        yield
    except FeastFailed:
        raise
    except Exception as error:
        # Feast passes on the exceptions of its stores' drivers, so there is no narrower class to catch.
        raise FeastFailed(f"{what}: {type(error).__name__}: {error}") from error


def _feast() -> Any:
    if find_spec("feast") is None:
        raise FeastFailed("Feast is not installed here; run pip install 'shoal[feast]'")
    # Feast warns about its own deprecated and experimental parts. A user of Shoal cannot fix those.
    warnings.filterwarnings("ignore", module=r"feast\b")
    with failing("Feast cannot be imported"):
        import feast
    return feast


def _open_registry(feast: Any, location: str, project: str | None) -> Any:
    def opened(name: str) -> Any:
        return feast.FeatureStore(config=feast.RepoConfig(registry=location, project=name, provider="local"))

    if project is None:
        projects = sorted(known.name for known in opened("any").registry.list_projects())
        if len(projects) != 1:
            raise FeastFailed(
                f"the registry {location} has {len(projects)} projects ({', '.join(projects) or 'none'}); name one "
                f"with --project"
            )
        project = projects[0]
    return opened(project)
