"""The public names that users import, and the modules that each import loads."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import shoal
import shoal.client
import shoal.errors
from shoal.engine.base import errors

PROJECT = Path(__file__).parents[2]


def run(program: str, cwd: Path = PROJECT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=cwd, check=False)


def test_the_public_names_are_these() -> None:
    assert shoal.__all__ == [
        "Feature",
        "FeatureStore",
        "JoinKey",
        "LookupResult",
        "MatrixResult",
        "StoreWriter",
        "ViewSchema",
        "define_view",
        "push_rows",
    ]
    assert all(getattr(shoal, name) is not None for name in shoal.__all__)
    assert set(shoal.__all__) <= set(dir(shoal))


def test_every_error_is_public() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.ShoalError)]
    assert sorted(kind.__name__ for kind in kinds) == sorted(shoal.errors.__all__)
    assert all(getattr(shoal.errors, kind.__name__) is kind for kind in kinds)


def test_an_unknown_name_is_an_attribute_error_that_lists_the_names() -> None:
    with pytest.raises(AttributeError, match=r"'shoal' has no attribute 'Store'; it has .*FeatureStore"):
        _ = shoal.Store


def test_the_client_and_the_package_import_no_heavy_package() -> None:
    heavy = ["numba", "lmdb", "pyarrow", "pydantic", "pandas", "aiohttp", "pyspark", "boto3"]
    ran = run(f"import sys, shoal.client; print([name for name in {heavy} if name in sys.modules])")
    assert ran.stdout == "[]\n", ran.stderr


def test_without_the_packages_of_a_server_the_error_names_the_extra() -> None:
    hide = "import sys; sys.modules['lmdb'] = None; "
    ran = run(hide + "from shoal import FeatureStore")
    assert "needs lmdb, which is not installed: pip install 'shoal[server]'" in ran.stderr
    ran = run(hide + "from shoal.__main__ import run; run()")
    assert ran.returncode == 1
    assert ran.stderr == "shoal: the commands need lmdb, which is not installed: pip install 'shoal[server]'\n"


def test_a_folder_of_the_users_with_the_name_of_one_of_ours_is_in_nobodys_way(tmp_path: Path) -> None:
    for name in ("engine", "loaders", "client"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the wrong module')\n")
    (tmp_path / "cli.py").write_text("raise SystemExit('the wrong program')\n")
    program = f"import sys; sys.path.append({str(PROJECT)!r}); "
    ran = run(f"{program}from shoal import FeatureStore, StoreWriter; import shoal.client, shoal.cli", tmp_path)
    assert ran.returncode == 0, ran.stderr


def test_the_folder_in_the_repository_is_not_a_package_of_its_own() -> None:
    ran = run("import engine")
    assert "import shoal.engine instead of engine" in ran.stderr


def test_the_version_is_that_of_the_project_file() -> None:
    assert f'\nversion = "{metadata.version("shoal")}"\n' in (PROJECT / "pyproject.toml").read_text()
