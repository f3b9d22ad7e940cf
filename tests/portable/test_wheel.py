"""The contents of the wheel."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
FOLDERS = ("engine", "loaders", "spark_export", "client")
FILES = ("cli.py", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of this checkout."""
    directory = tmp_path_factory.mktemp("wheel")
    source = directory / "source"
    for folder in ("shoal", *FOLDERS):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PROJECT / folder, source / folder, symlinks=True, ignore=ignored)
    for name in FILES:
        shutil.copy(PROJECT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", str(source)]
    subprocess.run([*command, "--wheel-dir", str(directory)], check=True)
    (built,) = directory.glob("*.whl")
    return built


def test_a_wheel_has_the_package_shoal_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"shoal"}
    sources = {path.relative_to(PROJECT) for folder in FOLDERS for path in (PROJECT / folder).rglob("*.py")}
    assert {f"shoal/{name}" for name in sources} <= set(names)
    assert {"shoal/py.typed", "shoal/cli.py", "shoal/engine/server/openapi.json"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_what_is_installed_runs(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    program = "import sys; sys.path.insert(0, sys.argv.pop(1)); import shoal; from shoal.__main__ import run; "
    program += "print(shoal.__file__, flush=True); run()"
    command = [sys.executable, "-P", "-c", program, str(tmp_path / "site"), "lookup", "--help"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(str(tmp_path / "site"))
    assert "--explain" in ran.stdout
