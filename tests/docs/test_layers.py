"""Imports point in one direction, between packages and between the folders of each package, in the order that the
diagram in ARCHITECTURE.md shows."""

import ast
import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
ARCHITECTURE = (PROJECT / "ARCHITECTURE.md").read_text()
PACKAGES = ("client", "engine", "loaders", "spark_export")
MAY_IMPORT = {
    "client": {"client"},
    "engine": {"engine"},
    "loaders": {"engine", "loaders"},
    "spark_export": {"engine", "spark_export"},
}


def drawn_order(package: str) -> list[str]:
    """Return the folders and files of a package in the order of ARCHITECTURE.md's diagram."""
    found = re.search(rf"^    {package} +((?:.*◄─.*\n)+?)(?=    \w|\n)", ARCHITECTURE, re.MULTILINE)
    assert found, package
    return [name.strip().removesuffix(".py") for name in found[1].replace("\n", " ").split("◄─")]


def imports_of(path: Path) -> set[tuple[str, str]]:
    """Return the package, and the folder or file in it, of each import of Shoal's own modules."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        modules = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        modules += [name.name for name in node.names] if isinstance(node, ast.Import) else []
        for module in modules:
            parts = module.split(".")
            if parts[0] == "shoal" and len(parts) > 1:
                found.add((parts[1], parts[2] if len(parts) > 2 else ""))
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_those_that_it_may(package: str) -> None:
    for path in (PROJECT / package).rglob("*.py"):
        others = {other for other, _ in imports_of(path)} & set(PACKAGES)
        assert others <= MAY_IMPORT[package], path


@pytest.mark.parametrize("package", ["engine", "loaders", "spark_export"])
def test_a_folder_imports_only_what_is_drawn_before_it(package: str) -> None:
    order = drawn_order(package)
    for path in (PROJECT / package).rglob("*.py"):
        own = path.relative_to(PROJECT / package).parts[0].removesuffix(".py")
        if own not in order:
            continue
        for other, folder in imports_of(path):
            if other == package and folder in order:
                assert order.index(folder) <= order.index(own), f"{path} imports {package}.{folder}"
    folders = {entry.name for entry in (PROJECT / package).iterdir() if entry.is_dir()} - {"__pycache__"}
    assert folders <= set(order), "ARCHITECTURE.md does not draw a folder"
