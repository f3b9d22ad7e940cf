"""Settings and fixtures for all tests."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

from shoal.engine.root.export_root import ExportRoot
from tests import stores

# The first call of a kernel compiles it, so an example may take any time.
settings.register_profile("shoal", deadline=None)
settings.load_profile("shoal")

# A JVM of these tests runs for so short a time that its optimizing compiler costs more than it gains.
os.environ.setdefault("SPARK_SUBMIT_OPTS", "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC")

LONG = (
    "failpoints/test_stream",
    "s3/",
    "e2e/",
    "feast_cli/",
    "spark_export/",
    "consistency/",
    "cli/",
    "loaders/test_writer",
)
"""Prefixes of the test files that take long. They run first, so that none of them runs at the end while other processes
are idle."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move tests that take long to the front."""

    def place(item: pytest.Item) -> int:
        name = item.nodeid.removeprefix("tests/")
        return next((place for place, prefix in enumerate(LONG) if name.startswith(prefix)), len(LONG))

    items.sort(key=place)


@pytest.fixture
def store(tmp_path: Path, root: ExportRoot) -> Path:
    """A store that is loaded from the `root` fixture of the same test."""
    stores.load(tmp_path / "store", root)
    return tmp_path / "store"
