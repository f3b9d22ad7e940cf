"""The code and commands in the README and in docs/ work: Python runs, and command lines parse."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml

from shoal.cli import shoal as command_line
from shoal.engine.root.export_root import ExportRoot
from shoal.spark_export.views.definition import load_views
from tests import stores
from tests.server.serving import Server

PROJECT = Path(__file__).parents[2]
PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
CHECKED_ELSEWHERE = {"push.md", "shards.md"}
"""Pages with examples that run in other tests, with the data that they need."""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def command_lines(page: Path) -> Iterator[list[str]]:
    """Yield the arguments of each `shoal` command of a page's shell examples."""
    text = page.read_text()
    shell = "\n".join(re.findall(r"^```(?:sh|shell|bash)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    shell += "\n" + "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))
    for line in shell.replace("\\\n", " ").splitlines():
        found = re.match(r"(?:\S*/)?shoal +(?!\W)(.*)", line.removeprefix("$ ").strip())
        if found and "…" not in line and not re.search(r"[$|<>\[]", found[1].partition("  #")[0].partition(" # ")[0]):
            yield shlex.split(found[1], comments=True)


def parse(arguments: list[str]) -> None:
    """Parse a command line without running it; raise click's error if it is wrong."""
    command: click.Command = command_line
    context = click.Context(command)
    while isinstance(command, click.Group):
        name, found, arguments = command.resolve_command(context, arguments)
        assert found is not None, name
        command = found
        context = click.Context(command, parent=context)
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for argument in arguments:
        if argument.startswith("--"):
            assert argument.partition("=")[0] in {*options, "--help"}, f"{command.name} has no {argument}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_have_the_options_that_it_gives(page: Path) -> None:
    for arguments in command_lines(page):
        parse(arguments)


def test_the_pages_have_commands() -> None:
    assert sum(len(list(command_lines(page))) for page in PAGES) > 25


def test_the_readmes_code_runs(tmp_path: Path) -> None:
    quickstart, client = blocks(PROJECT / "README.md", "python")
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}

    def run(program: str) -> str:
        return subprocess.check_output([sys.executable, "-c", program], cwd=tmp_path, env=environment, text=True)

    assert run(quickstart).startswith("{'docs:clicks_7d': [3, 17, None], 'docs:embedding': [[0.69")
    with Server(tmp_path / "store") as server:
        server.await_ready()
        assert run(client.replace("http://127.0.0.1:8080", server.record.address)) == "{'docs:clicks_7d': [17, 3]}\n"


def test_the_tutorials_code_runs(tmp_path: Path) -> None:
    source, client = blocks(PROJECT / "docs" / "tutorial.md", "python")
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    subprocess.run([sys.executable, "-c", source], cwd=tmp_path, env=environment, check=True)
    (tmp_path / "views.yaml").write_text(blocks(PROJECT / "docs" / "tutorial.md", "yaml")[0])
    loaded = load_views(tmp_path / "views.yaml")
    view = stores.schema("docs", clicks_7d="int64", ctr="float64")
    (described,) = loaded.views
    assert [(f.name, f.type) for f in described.features] == [(f.name, f.type) for f in view.features]
    root = ExportRoot(tmp_path / "root")
    view = view.model_copy(update={"join_keys": described.join_keys})
    stores.publish_snapshot(root, view, [{"doc_id": f"d{n}", "clicks_7d": n, "ctr": n / 1000} for n in range(9)])
    with Server(tmp_path / "store", {"root": str(root)}) as server:
        server.await_ready()
        client = client.replace("http://127.0.0.1:8080", server.record.address).replace('"ranker_v1"', '["docs:*"]')
        printed = subprocess.check_output([sys.executable, "-c", client], env=environment, text=True)
    assert printed == "{'docs:clicks_7d': [1, 2], 'docs:ctr': [0.001, 0.002]}\n"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_other_code_of_a_page_is_python_and_yaml(page: Path) -> None:
    for program in blocks(page, "python"):
        compile(program.replace("…", "..."), page.name, "exec")
    for document in blocks(page, "yaml"):
        assert list(yaml.safe_load_all(re.sub(r"^ *…\n", "", document, flags=re.MULTILINE))), page
