"""The systemd unit, the compose file and the alert rules: each is checked by the program that uses it."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from shoal.cli import serve_command
from shoal.engine.process.run_directory import read_server_record
from shoal.engine.root.export_root import ExportRoot
from tests import stores
from tests.deploy.chart import CHART, DEPLOY
from tests.deploy.programs import running
from tests.server.serving import eventually

UNIT = DEPLOY / "systemd" / "shoal@.service"
RULES = CHART / "files" / "alerts.yaml"
_SYSTEMD = shutil.which("systemd-analyze")
_PROMTOOL = shutil.which("promtool")


def unit_values(name: str) -> list[str]:
    """Return the values that the unit sets for a name."""
    return re.findall(rf"^{name}=(.*)$", UNIT.read_text(), re.MULTILINE)


@pytest.mark.skipif(_SYSTEMD is None, reason="there is no systemd: apt-get install systemd")
def test_systemd_takes_the_unit_and_finds_it_hardened(tmp_path: Path) -> None:
    unit = tmp_path / "shoal@features.service"
    # The machine of this test has neither the program nor the user.
    text = UNIT.read_text().replace("/opt/shoal/bin/shoal", sys.executable)
    unit.write_text(text)
    verified = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert (verified.returncode, verified.stderr) == (0, "")
    secured = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=25", "--no-pager", str(unit)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert secured.returncode == 0, secured.stdout


def test_the_command_of_the_unit_serves_and_tells_systemd(tmp_path: Path) -> None:
    root = ExportRoot(tmp_path / "root")
    stores.publish_snapshot(root, stores.schema("doc", key="int64", a="int64"), [{"doc_id": 1, "a": 1}])
    (command,) = unit_values("ExecStart")
    store = tmp_path / "shoal" / "features"
    command = command.replace("/opt/shoal/bin/", f"{Path(sys.executable).parent}/").replace("%S", str(tmp_path))
    command = command.replace("%i", "features").replace("${SHOAL_ROOT}", str(root))
    arguments = command.replace("$SHOAL_ARGS", "--host 127.0.0.1 --port 0 --workers 2").split()
    assert {part for part in arguments if part.startswith("--")} <= {o for p in serve_command.params for o in p.opts}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(30)
        with running(arguments, tmp_path / "log", {"NOTIFY_SOCKET": str(tmp_path / "notify")}) as process:
            assert manager.recv(100) == b"READY=1"
            record = eventually(lambda: read_server_record(store), "the server's record")
            assert record.pid == process.pid
            # This is what `systemctl reload` sends.
            os.kill(process.pid, signal.SIGHUP)
            process.terminate()
            assert manager.recv(100) == b"STOPPING=1"
            assert process.wait(30) == 0


def test_the_example_of_an_environment_is_what_the_unit_reads() -> None:
    lines = (DEPLOY / "systemd" / "features.env").read_text().splitlines()
    given = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert given.keys() == set(re.findall(r"\bSHOAL_[A-Z]+\b", UNIT.read_text()))
    known = {name for parameter in serve_command.params for name in parameter.opts}
    assert {part for part in given["SHOAL_ARGS"].split() if part.startswith("--")} <= known


def test_the_compose_file_is_one_and_names_what_is_there() -> None:
    compose_spec = pytest.importorskip("compose_spec")
    document: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    compose_spec.PyCompose.from_yaml(yaml.safe_dump(document)).validate()
    services = document["services"]
    known = {name for parameter in serve_command.params for name in parameter.opts}
    for name in ("replica-1", "replica-2"):
        options = [part.partition("=")[0] for part in services[name]["command"] if part.startswith("--")]
        assert set(options) <= known
    for service in services.values():
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            assert (DEPLOY / source).exists() if source.startswith(".") else source in document["volumes"]
        assert set(service.get("depends_on", ())) <= services.keys()
    targets = re.findall(r"^FROM \S+(?: AS (\w+))?", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert {service["build"].get("target", "") for service in services.values() if "build" in service} <= {*targets}
    scraped = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"][0]["static_configs"][0]
    assert {target.partition(":")[0] for target in scraped["targets"]} <= services.keys()


def test_rules_of_alerts_name_metrics_that_there_are() -> None:
    page = (DEPLOY.parent / "docs" / "http.md").read_text()
    expressions = [rule["expr"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    named = {name for expression in expressions for name in re.findall(r"\bshoal_\w+", expression)}
    assert named
    assert {name for name in named if f"`{name}`" not in page} == set()


ALERT_CASES = """
rule_files: [RULES]
evaluation_interval: 15s
tests:
  - interval: 15s
    input_series:
      - {series: 'shoal_view_applied_seq{job="shoal",instance="a",view="docs"}', values: '100+5x40'}
      - {series: 'shoal_view_applied_seq{job="shoal",instance="b",view="docs"}', values: '100+0x40'}
      - {series: 'shoal_view_lag_seconds{job="shoal",instance="a",view="docs"}', values: '0x40'}
      - {series: 'shoal_view_lag_seconds{job="shoal",instance="b",view="docs"}', values: '0+15x40'}
      - {series: 'shoal_view_lag_seconds{job="shoal",instance="b",view="bad"}', values: '0+15x40'}
      - {series: 'shoal_view_held{job="shoal",instance="a",view="docs"}', values: '0x40'}
      - {series: 'shoal_view_held{job="shoal",instance="b",view="docs"}', values: '0x40'}
      - {series: 'shoal_view_held{job="shoal",instance="b",view="bad"}', values: '1x40'}
      - {series: 'shoal_view_trouble{job="shoal",instance="b",view="bad"}', values: '1x40'}
      - {series: 'shoal_root_unseen_seconds{job="shoal",instance="a"}', values: '2x40'}
      - {series: 'shoal_scrub_period_seconds{job="shoal",instance="a"}', values: '86400x80'}
      - {series: 'shoal_scrub_period_seconds{job="shoal",instance="b"}', values: '86400x80'}
      - {series: 'shoal_scrub_age_seconds{job="shoal",instance="a"}', values: '172800+15x80'}
      - {series: 'shoal_scrub_age_seconds{job="shoal",instance="b"}', values: '86400x80'}
      - {series: 'shoal_scrub_damaged_chunks_total{job="shoal",instance="a"}', values: '0x80'}
      - {series: 'shoal_scrub_damaged_chunks_total{job="shoal",instance="b"}', values: '0x8 1x72'}
      - {series: 'shoal_view_kept_damaged{job="shoal",instance="a",view="docs"}', values: '0x80'}
    alert_rule_test:
      - {eval_time: 2m, alertname: ShoalViewBehind, exp_alerts: []}
      - eval_time: 8m
        alertname: ShoalViewBehind
        exp_alerts:
          - exp_labels: {severity: warning, job: shoal, instance: b, view: docs}
            exp_annotations: {summary: b is 8m 0s behind its root with docs}
      - eval_time: 8m
        alertname: ShoalVersionSkew
        exp_alerts:
          - exp_labels: {severity: warning, job: shoal, view: docs}
            exp_annotations: {summary: Replicas of shoal differ by 160 entries of docs}
      - eval_time: 8m
        alertname: ShoalViewHeld
        exp_alerts:
          - exp_labels: {severity: critical, job: shoal, view: bad}
            exp_annotations: {summary: "An entry of bad cannot be applied by any replica: publish a snapshot"}
      - {eval_time: 8m, alertname: ShoalViewTrouble, exp_alerts: []}
      - {eval_time: 8m, alertname: ShoalScrubLate, exp_alerts: []}
      - eval_time: 15m
        alertname: ShoalScrubLate
        exp_alerts:
          - exp_labels: {severity: warning, job: shoal, instance: a}
            exp_annotations: {summary: a has not verified all its checksums for 2d 0h 15m 0s}
      - eval_time: 8m
        alertname: ShoalScrubFoundDamage
        exp_alerts:
          - exp_labels: {severity: warning, job: shoal, instance: b}
            exp_annotations: {summary: Flipped bits on the disk or in the memory of b within the last day}
      - {eval_time: 8m, alertname: ShoalKeptDamaged, exp_alerts: []}
      - {eval_time: 8m, alertname: ShoalRootUnseen, exp_alerts: []}
"""


@pytest.mark.skipif(_PROMTOOL is None, reason="there is no promtool: apt-get install prometheus")
def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    cases = tmp_path / "cases.yaml"
    cases.write_text(ALERT_CASES.replace("RULES", str(RULES)))
    for command in (["check", "rules", str(RULES)], ["test", "rules", str(cases)]):
        done = subprocess.run(["promtool", *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
