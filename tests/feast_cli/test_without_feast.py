"""The Feast commands if Feast is not installed."""

from pathlib import Path

import pytest

from shoal.engine.base.errors import FeastFailed
from shoal.engine.feast import repository


def test_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "feature_store.yaml").touch()
    monkeypatch.setattr(repository, "find_spec", lambda name: None)
    with pytest.raises(FeastFailed, match=r"Feast is not installed here; run pip install 'shoal\[feast\]'"):
        repository.open_repository(str(tmp_path))


def test_a_place_that_is_no_repository_is_named_first(tmp_path: Path) -> None:
    with pytest.raises(FeastFailed, match=r"has no feature_store\.yaml"):
        repository.open_repository(str(tmp_path))
    with pytest.raises(FeastFailed, match=r".*/registry\.db does not exist"):
        repository.open_repository(str(tmp_path / "registry.db"))
