"""`shoal export` as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from shoal.engine.base.errors import DefinitionError, RemovalRefused, SourceError, SparkFailed
from shoal.spark_export.cli.export_command import export_command
from tests.spark_export.lab import KEY, TIMESTAMP, VIEW, Lab, ago

ROWS = [{KEY: f"d{i}", "n": i, TIMESTAMP: ago(hours=9)} for i in range(1500)]
PROGRAM = "from shoal.spark_export.cli.export_command import export_command; export_command()"


def _run(lab: Lab, *arguments: str) -> Result:
    command = ["--views", str(lab.views_path), "--to", str(lab.root), *arguments]
    return CliRunner().invoke(export_command, command)


def _process(lab: Lab, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", PROGRAM, "--views", str(lab.views_path), "--to", str(lab.root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)


@pytest.fixture
def two_views(lab: Lab) -> Lab:
    """A lab with the valid view `docs`, the invalid view `broken`, and a service."""
    lab.define({"n": "int64"})
    lab.put(ROWS)
    definition = """\
- name: broken
  join_keys: [{name: doc_id, type: string}]
  features: [{name: absent, type: int64}]
  source: {path: source}
services: [{name: ranker, features: ["docs:*"]}]
"""
    lab.views_path.write_text(lab.views_path.read_text() + definition)
    return lab


def test_it_tells_a_person_what_it_did(two_views: Lab) -> None:
    first = _run(two_views, "--view", VIEW)
    assert first.exit_code == 0, first.exception
    assert first.output.startswith("docs: snapshot 1 (first export), ")
    assert "MB: 1,500 new; " in first.output
    (service,) = two_views.root.services()
    assert service.name == "ranker"

    two_views.put([ROWS[0] | {"n": 7}, *ROWS[2:]])
    assert "MB: 1 changed, 1 removed, 1,498 unchanged; " in _run(two_views, "--view", VIEW).output
    assert "docs: nothing to publish, still at seq 2: 1,499 unchanged; " in _run(two_views, "--view", VIEW).output
    full = _run(two_views, "--view", VIEW, "--full")
    assert "docs: snapshot 3 (requested), " in full.output
    assert full.stderr == ""


def test_a_view_that_was_renamed_is_told_of_and_its_name_can_be_used_again_once_it_is_dropped(lab: Lab) -> None:
    lab.define({"n": "int64"})
    lab.put(ROWS)
    lab.export()
    definition = lab.views_path.read_text()
    lab.views_path.write_text(definition.replace(f"name: {VIEW}", "name: papers"))
    result = _run(lab, "--json")
    assert [report["view"] for report in json.loads(result.stdout)] == ["papers"]
    assert f"{lab.root} has view {VIEW}, but {lab.views_path} does not name it" in result.stderr
    assert f"`shoal drop-view {VIEW} --root {lab.root}`" in result.stderr
    lab.root.drop_view(VIEW)
    assert _run(lab).stderr == ""
    # The seq distinguishes this view from the dropped one.
    lab.views_path.write_text(definition)
    assert f"{VIEW}: snapshot 2 (first export), " in _run(lab, "--view", VIEW).output


def test_a_view_that_fails_does_not_hide_those_published_before_it(two_views: Lab) -> None:
    result = _run(two_views, "--json")
    assert isinstance(result.exception, SourceError)
    assert "view 'broken': " in str(result.exception)
    (report,) = json.loads(result.output)
    assert (report["view"], report["seq"], report["kind"], report["new"]) == (VIEW, 1, "snapshot", 1500)
    # Services name views that clients may request, so they are published only after all views.
    assert two_views.root.services() == ()


def test_it_tells_what_it_refuses(lab: Lab) -> None:
    lab.define({"n": "int64", "m": "int64"})
    lab.put([row | {"m": 1} for row in ROWS])
    assert _run(lab).exit_code == 0
    lab.put([row | {TIMESTAMP: ago(hours=1), "n": None, "m": None} for row in ROWS[:1100]])
    result = _run(lab)
    assert isinstance(result.exception, RemovalRefused)
    assert result.output.startswith(
        "docs: refused, still at seq 1: 400 of 1,500 rows would be removed (26.67%; limit: 20%) and 2 more: "
        "1,100 changed, 400 removed; "
    )
    result = _run(lab, "--json")
    (report,) = json.loads(result.output)
    assert (report["kind"], report["seq"], report["removed"]) == (None, 1, 400)
    rows, values, _ = report["refused"]
    assert rows == {"feature": None, "had": 1500, "lost": 400, "share": 400 / 1500, "limit": 0.2}
    assert values == {"feature": "m", "had": 1500, "lost": 1100, "share": 1100 / 1500, "limit": 0.2}
    assert lab.seqs() == [1]
    assert "docs: delta 2, " in _run(lab, "--allow-removals").output


def test_a_view_that_only_streams_is_told(lab: Lab) -> None:
    stream = {"format": "json", "path": "events", "columns": "doc_id STRING, event_timestamp TIMESTAMP, n BIGINT"}
    lab.define({"n": "int64"}, source=None, stream=stream)
    result = _run(lab)
    assert (result.exit_code, result.stdout) == (
        0,
        "docs: only its definition is published; `shoal stream` publishes its rows\n",
    )
    assert _run(lab, "--json").stdout == "[]\n"


def test_packages_are_for_the_spark_that_an_export_starts(lab: Lab) -> None:
    lab.define({"n": "int64"})
    result = _run(lab, "--package", "org.apache.spark:spark-avro_2.13:4.1.1")
    assert isinstance(result.exception, SparkFailed)
    assert "cannot load packages" in str(result.exception)


def test_a_view_that_is_not_defined(lab: Lab) -> None:
    lab.define({"n": "int64"})
    result = _run(lab, "--view", "dogs")
    assert isinstance(result.exception, DefinitionError)
    assert str(result.exception) == "no view 'dogs' is defined; the defined views are: docs"


def test_a_process_of_its_own_prints_nothing_but_its_reports(lab: Lab) -> None:
    lab.define({"n": "int64"})
    lab.put(ROWS)
    process = _process(lab, "--json", "--master", "local[2]")
    assert process.stderr == ""
    (report,) = json.loads(process.stdout)
    assert report["new"] == len(ROWS)


@pytest.mark.parametrize(
    ("preparation", "environment", "message"),
    [
        ("", {"JAVA_HOME": "/nowhere"}, "there is no /nowhere/bin/java; apt-get install openjdk-17-jre-headless"),
        ("import sys; sys.modules['pyspark'] = None; ", {}, "an export needs pyspark"),
    ],
)
def test_what_is_missing_is_named(
    lab: Lab, tmp_path: Path, preparation: str, environment: dict[str, Any], message: str
) -> None:
    program = f"{preparation}from shoal.spark_export.source.session import spark_session; spark_session()"
    process = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | environment, check=False
    )
    assert "shoal.engine.base.errors.SparkFailed" in process.stderr
    assert message in process.stderr
