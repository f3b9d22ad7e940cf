"""A Feast repository, for the commands that compare with it or take it over.

Feast is no dependency of Shoal: it is imported here alone, when a command needs it, and what it raises is told as one
error. It has no types that could be checked, so what comes from it is `Any`.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from engine.errors import FeastFailed

CONFIGURATION = "feature_store.yaml"


def open_repository(location: str, project: str | None = None) -> Any:
    """Open a Feast repository; returns a `feast.FeatureStore`.

    Args:
        location: a directory with a feature_store.yaml, such a file, or a registry (a file, or an address of one).
        project: which project of the registry; needed only for a registry that holds several.

    Raises:
        FeastFailed: Feast is not installed, or cannot open it.
    """
    path = Path(location)
    if path.is_dir() and not (path / CONFIGURATION).is_file():
        raise FeastFailed(f"{location} has no {CONFIGURATION}; give a Feast repository, or the path of a registry")
    if "://" not in location and not path.exists():
        raise FeastFailed(f"there is no {location}; give a Feast repository, or the path of a registry")
    feast = _feast()
    with failing(f"Feast cannot open {location}"):
        if path.is_dir():
            store = feast.FeatureStore(repo_path=location)
        elif path.suffix in (".yaml", ".yml"):
            store = feast.FeatureStore(repo_path=str(path.parent), fs_yaml_file=path.absolute())
        else:
            return _open_registry(feast, location, project)
    if project not in (None, store.project):
        raise FeastFailed(f"{location} is of project {store.project!r}, not {project!r}; leave out --project")
    return store


@contextmanager
def failing(what: str) -> Iterator[None]:
    """Tell whatever Feast raises as a FeastFailed that begins with `what`."""
    try:
        yield
    except FeastFailed:
        raise
    except Exception as error:
        # Feast lets through what its stores' drivers raise: there is no narrower class than this one.
        raise FeastFailed(f"{what}: {type(error).__name__}: {error}") from error


def _feast() -> Any:
    if find_spec("feast") is None:
        raise FeastFailed("Feast is not installed here; run pip install 'shoal[feast]'")
    # It warns of its own deprecated and experimental parts, which is nothing that a user of Shoal could mend.
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
                f"the registry {location} holds {len(projects)} projects ({', '.join(projects) or 'none'}); name one "
                f"with --project"
            )
        project = projects[0]
    return opened(project)
