"""What holds for all tests."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

from engine.export_root import ExportRoot
from tests import stores

# A kernel is compiled when it is first called: no example is too slow for that.
settings.register_profile("shoal", deadline=None)
settings.load_profile("shoal")

# Every JVM here runs for so short a time that its optimizing compiler costs more than it gains.
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
"""Files of tests that take long: they come first, lest one of them runs at the end while other processes have none."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put tests that take long first."""

    def place(item: pytest.Item) -> int:
        name = item.nodeid.removeprefix("tests/")
        return next((place for place, prefix in enumerate(LONG) if name.startswith(prefix)), len(LONG))

    items.sort(key=place)


@pytest.fixture
def store(tmp_path: Path, root: ExportRoot) -> Path:
    """A store that was loaded from the root of the test that asks for it."""
    stores.load(tmp_path / "store", root)
    return tmp_path / "store"
