"""Fixtures for a Feast repository that Shoal takes over: views.yaml is made from it, Spark exports it, and it is
loaded."""

from pathlib import Path
from typing import Any

import pytest

from tests.feast_cli.repository import Place, make_repository


@pytest.fixture(scope="session")
def feast() -> Any:
    return pytest.importorskip("feast", reason="Feast is not installed: pip install 'shoal[feast]'")


@pytest.fixture(scope="session")
def taken_over(feast: Any, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The repository, with `views.yaml`, `root` and `store` beside it."""
    place = Place(tmp_path_factory.mktemp("takeover"))
    make_repository(feast, place)
    place.shoal("feast-views", "repository", "--output", "views.yaml")
    place.shoal("export", "--views", "views.yaml", "--to", "root", "--master", "local[1]")
    place.shoal("load", "--store", "store", "--from", "root")
    return place


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """An empty directory."""
    return Place(tmp_path)
