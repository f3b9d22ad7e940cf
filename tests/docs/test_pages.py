"""The pages of docs/ match the code: the command line's page is generated, and the others name all endpoints and
metrics."""

import os
import re
import subprocess
import sys
from pathlib import Path

import generate
from click.testing import CliRunner

from perf import capacity
from shoal import FeatureStore
from shoal.engine.format.schema import JoinKey
from shoal.engine.root.export_root import ExportRoot
from tests import stores

DOCS = Path(generate.__file__).parent
DOC_ID = JoinKey(name="doc_id", type="string")


def test_the_page_of_the_command_line_is_what_the_commands_say() -> None:
    # In a new process, because click caches a command's help as it was first rendered in a process.
    program = "import generate; print(generate.cli_page(), end='')"
    environment = os.environ | {"PYTHONPATH": f"{DOCS}{os.pathsep}{DOCS.parent}"}
    page = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert page.stdout == generate.CLI_PAGE.read_text(), "run `python docs/generate.py`"


def test_every_endpoint_and_metric_has_its_place_in_the_page_of_the_http_interface() -> None:
    page = (DOCS / "http.md").read_text()
    server = DOCS.parent / "engine" / "server"
    endpoints = set(re.findall(r'"(/[a-z0-9/-]+)"(?:: \{|\n)', (server / "app.py").read_text()))
    metrics = set(re.findall(r'"(shoal_[a-z_]+)"', (server / "metrics.py").read_text()))
    assert endpoints
    assert metrics
    assert {name for name in endpoints | metrics if name not in page} == set()


def test_every_test_that_the_page_of_faults_names_is_there() -> None:
    named = re.findall(r"\[(test_\w+)\]\(([^)]+)\)", (DOCS / "faults.md").read_text())
    assert named
    assert [test for test, file in named if f"def {test}(" not in (DOCS / file).read_text()] == []


def test_links_between_pages_lead_somewhere() -> None:
    for page in [*DOCS.glob("*.md"), *DOCS.parent.glob("*.md")]:
        for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_page_of_capacity_has_what_its_program_prints() -> None:
    printed = CliRunner().invoke(capacity.main).output
    assert printed in (DOCS / "capacity.md").read_text(), "run `python -m perf.capacity --into docs/capacity.md`"


def test_the_example_of_pushes_in_process_runs(tmp_path: Path) -> None:
    view = stores.schema("docs", clicks_7d="int64").model_copy(update={"join_keys": (DOC_ID,)})
    root = ExportRoot(tmp_path / "root")
    stores.publish_snapshot(root, view, [{"doc_id": "d1", "clicks_7d": 1}])
    stores.load(tmp_path / "store", root)
    (example,) = re.findall(r"```python\n(.*?)```", (DOCS / "push.md").read_text(), re.DOTALL)
    assert '"/var/lib/shoal"' in example
    # In a process of its own, as a user who copies the example would run it.
    program = example.replace('"/var/lib/shoal"', repr(str(tmp_path / "store")))
    subprocess.run([sys.executable, "-c", program], cwd=DOCS.parent, check=True)
    with FeatureStore.open(tmp_path / "store") as store:
        assert store.lookup(["docs:clicks_7d"], {"doc_id": ["d1"]}).to_pydict() == {"docs:clicks_7d": [18]}
