"""The commands where Feast is not installed."""

from pathlib import Path

import pytest

from engine import feast_repository
from engine.errors import FeastFailed


def test_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "feature_store.yaml").touch()
    monkeypatch.setattr(feast_repository, "find_spec", lambda name: None)
    with pytest.raises(FeastFailed, match=r"Feast is not installed here; run pip install 'shoal\[feast\]'"):
        feast_repository.open_repository(str(tmp_path))


def test_a_place_that_is_no_repository_is_named_first(tmp_path: Path) -> None:
    with pytest.raises(FeastFailed, match=r"has no feature_store\.yaml"):
        feast_repository.open_repository(str(tmp_path))
    with pytest.raises(FeastFailed, match=r"there is no .*/registry\.db"):
        feast_repository.open_repository(str(tmp_path / "registry.db"))
