"""The chart, rendered by the real helm."""

import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
CHART = DEPLOY / "helm" / "shoal"
BUILT = Path(__file__).parents[2] / ".helm" / "helm"
# A helm that was built by `go install` assumes an old version of Kubernetes.
KUBERNETES = "1.33.0"

Manifest = dict[str, Any]
NEEDED: Mapping[str, Any] = {"root": "s3://features/prod", "tokens": {"secretName": "shoal-tokens"}}


def helm(*arguments: str, values: Mapping[str, Any], tmp_path: Path) -> "subprocess.CompletedProcess[str]":
    """Run a helm command on the chart with these values over its own, and return the finished process."""
    program = str(BUILT) if BUILT.exists() else shutil.which("helm")
    if program is None:
        pytest.skip("there is no helm; `make .helm/helm` builds one")
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump(dict(values)))
    command, *more = arguments
    call = [program, command, *more, str(CHART), "--values", str(file), "--kube-version", KUBERNETES]
    return subprocess.run(call, capture_output=True, text=True, check=False)


def render(tmp_path: Path, **values: Any) -> list[Manifest]:
    """Return the objects that the chart renders from values."""
    done = helm("template", "prod", values={**NEEDED, **values}, tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    return [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest]


def of_kind(manifests: list[Manifest], *kinds: str) -> Iterator[Manifest]:
    return (manifest for manifest in manifests if manifest["kind"] in kinds)


def workloads(manifests: list[Manifest]) -> list[Manifest]:
    """Return the objects that make pods. There is at least one."""
    found = [*of_kind(manifests, "Deployment", "StatefulSet")]
    assert found
    return found


def container(workload: Manifest) -> Manifest:
    """Return the container that serves. It is the only container of the workload."""
    (found,) = workload["spec"]["template"]["spec"]["containers"]
    assert isinstance(found, dict)
    return found
