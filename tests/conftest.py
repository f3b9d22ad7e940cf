"""What holds for all tests."""

from pathlib import Path

import pytest
from hypothesis import settings

from engine.export_root import ExportRoot
from tests import stores

# A kernel is compiled when it is first called: no example is too slow for that.
settings.register_profile("shoal", deadline=None)
settings.load_profile("shoal")


@pytest.fixture
def store(tmp_path: Path, root: ExportRoot) -> Path:
    """A store that was loaded from the root of the test that asks for it."""
    stores.load(tmp_path / "store", root)
    return tmp_path / "store"
