"""The chart renders objects that are valid for Kubernetes, fit each other, and have arguments that `shoal serve`
accepts."""

import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import kubernetes_validate
import pytest
import yaml

from shoal.cli import serve_command
from shoal.engine.root.export_root import ExportRoot
from shoal.loaders.dynamodb.command import sync_dynamodb_command
from shoal.spark_export.cli.stream_command import stream_command
from tests import stores
from tests.deploy.chart import CHART, NEEDED, Manifest, container, helm, of_kind, render, workloads
from tests.deploy.programs import running
from tests.s3.server import free_port
from tests.server.serving import eventually

VALUES: dict[str, dict[str, Any]] = {
    "default": {},
    "open": {"tokens": {"secretName": ""}, "openToAll": True},
    "volumes": {"persistence": {"enabled": True, "storageClassName": "fast"}},
    "single": {"replicas": 1},
    "autoscaled": {"autoscaling": {"enabled": True, "minReplicas": 3}, "grpcPort": 6566},
    "shards": {"shards": 3, "persistence": {"enabled": True}, "autoscaling": {"enabled": True}},
    "everything": {
        "tls": {"secretName": "shoal-tls"},
        "networkPolicy": {"enabled": True},
        "protectMetrics": True,
        "readyUnseenSeconds": 3600,
        "extraArgs": ["--access-log", "--max-keys=5000"],
        "serviceAccount": {"annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/shoal"}},
        "env": [{"name": "AWS_REGION", "value": "eu-central-1"}],
        "envFrom": [{"secretRef": {"name": "s3-keys"}}],
        "imagePullSecrets": [{"name": "registry"}],
        "monitoring": {"podMonitor": {"enabled": True}, "rules": {"enabled": True, "labels": {"team": "ranking"}}},
        "nodeSelector": {"disk": "nvme"},
        "tolerations": [{"key": "features", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "podAnnotations": {"a": "b"},
        "podLabels": {"team": "ranking"},
        "priorityClassName": "serving",
        "extraVolumes": [{"name": "root", "persistentVolumeClaim": {"claimName": "exports", "readOnly": True}}],
        "extraVolumeMounts": [{"name": "root", "mountPath": "/exports", "readOnly": True}],
        "root": "/exports/prod",
    },
    "client certificates": {
        "tls": {"secretName": "shoal-tls", "clientCaSecretName": "house", "clientSecretName": "probe"},
        "networkPolicy": {"enabled": True, "from": [{"namespaceSelector": {"matchLabels": {"team": "ranking"}}}]},
        "grpcPort": 6566,
        "monitoring": {"podMonitor": {"enabled": True}},
    },
}
OPERATORS = ("PodMonitor", "PrometheusRule")
"""Kinds that Prometheus's operator defines. Kubernetes has no schemas for them."""


@pytest.fixture(params=VALUES, scope="module")
def manifests(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    return render(tmp_path_factory.mktemp("values"), **VALUES[request.param])


def matches(selector: dict[str, str], labels: dict[str, str]) -> bool:
    return selector.items() <= labels.items()


def test_kubernetes_takes_what_is_rendered(manifests: list[Manifest]) -> None:
    for manifest in manifests:
        if manifest["kind"] not in OPERATORS:
            kubernetes_validate.validate(manifest, "1.33", strict=True)
    names = [(manifest["kind"], manifest["metadata"]["name"]) for manifest in manifests]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("values", VALUES)
def test_helm_finds_no_fault_in_the_chart(values: str, tmp_path: Path) -> None:
    linted = helm("lint", "--strict", values={**NEEDED, **VALUES[values]}, tmp_path=tmp_path)
    assert linted.returncode == 0, linted.stdout


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"root": ""}, "root is not set: name the export root"),
        ({"root": "features/prod"}, "root"),
        ({"tokens": {"secretName": ""}}, "nobody is told who may ask: set tokens.secretName, or openToAll"),
        (
            {"tls": {"clientCaSecretName": "house"}},
            "the server needs tls.secretName, and the probes",
        ),
        ({"shards": 0}, "shards"),
        ({"replica": 3}, "replica"),
        ({"readyLagSeconds": "soon"}, "readyLagSeconds"),
        ({"persistence": {"accessModes": ["ReadWriteMany"]}}, "accessModes"),
    ],
)
def test_values_that_cannot_be_meant_are_refused_and_named(
    values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    refused = helm("template", "prod", values={**NEEDED, **values}, tmp_path=tmp_path)
    assert refused.returncode != 0
    assert message in refused.stderr


def test_whatever_selects_pods_selects_those_of_its_shard(manifests: list[Manifest]) -> None:
    pods = {one["metadata"]["name"]: one["spec"]["template"]["metadata"]["labels"] for one in workloads(manifests)}
    for one in workloads(manifests):
        selector = one["spec"]["selector"]["matchLabels"]
        assert [name for name, labels in pods.items() if matches(selector, labels)] == [one["metadata"]["name"]]
        for spread in one["spec"]["template"]["spec"]["topologySpreadConstraints"]:
            assert matches(spread["labelSelector"]["matchLabels"], pods[one["metadata"]["name"]])
    selectors = [one["spec"]["selector"] for one in of_kind(manifests, "Service")]
    selectors += [one["spec"]["selector"]["matchLabels"] for one in of_kind(manifests, "PodDisruptionBudget")]
    for selector in selectors:
        assert sum(matches(selector, labels) for labels in pods.values()) == 1
    for kind, member in (("PodMonitor", "selector"), ("NetworkPolicy", "podSelector")):
        for one in of_kind(manifests, kind):
            assert all(matches(one["spec"][member]["matchLabels"], labels) for labels in pods.values())


def test_objects_name_objects_that_are_there(manifests: list[Manifest]) -> None:
    there = {(one["kind"], one["metadata"]["name"]) for one in manifests}
    for scaler in of_kind(manifests, "HorizontalPodAutoscaler"):
        target = scaler["spec"]["scaleTargetRef"]
        assert (target["kind"], target["name"]) in there
        assert scaler["spec"]["minReplicas"] <= scaler["spec"]["maxReplicas"]
    for one in workloads(manifests):
        pod = one["spec"]["template"]["spec"]
        assert ("ServiceAccount", pod["serviceAccountName"]) in there
        if one["kind"] == "StatefulSet":
            (headless,) = (
                s for s in of_kind(manifests, "Service") if s["metadata"]["name"] == one["spec"]["serviceName"]
            )
            assert headless["spec"]["clusterIP"] == "None"
        claimed = [claim["metadata"]["name"] for claim in one["spec"].get("volumeClaimTemplates", ())]
        volumes = {*claimed, *(volume["name"] for volume in pod["volumes"])}
        mounted = {
            mount["name"] for each in (*pod["containers"], *pod["initContainers"]) for mount in each["volumeMounts"]
        }
        assert mounted == volumes
        # An autoscaler owns the number of replicas; helm would reset the number.
        assert ("replicas" in one["spec"]) is not any(of_kind(manifests, "HorizontalPodAutoscaler"))


def test_a_budget_leaves_a_replica_and_never_holds_up_a_node(manifests: list[Manifest]) -> None:
    scalers = {
        one["metadata"]["name"]: one["spec"]["minReplicas"] for one in of_kind(manifests, "HorizontalPodAutoscaler")
    }
    least = {
        one["metadata"]["name"]: scalers.get(one["metadata"]["name"], one["spec"].get("replicas"))
        for one in workloads(manifests)
    }
    budgets = {
        one["metadata"]["name"]: one["spec"]["maxUnavailable"] for one in of_kind(manifests, "PodDisruptionBudget")
    }
    assert budgets.keys() == {name for name, count in least.items() if count > 1}
    for name, unavailable in budgets.items():
        assert 1 <= unavailable < least[name]


def test_a_server_knows_each_argument_and_has_all_ports_and_paths(manifests: list[Manifest]) -> None:
    known = {name for parameter in serve_command.params for name in parameter.opts}
    for one in workloads(manifests):
        serving = container(one)
        assert serving["command"] == ["shoal", "serve"]
        given = [argument.partition("=")[0] for argument in serving["args"]]
        assert {name for name in given if name not in known} == set()
        assert len(set(given)) == len(given)
        arguments = dict(argument.partition("=")[::2] for argument in serving["args"])
        ports = {port["name"]: port["containerPort"] for port in serving["ports"]}
        assert ports["http"] == int(arguments["--port"])
        assert str(ports.get("grpc", "")) == arguments.get("--grpc-port", "")
        for service in of_kind(manifests, "Service"):
            assert {port["targetPort"] for port in service["spec"]["ports"]} == ports.keys()
        for policy in of_kind(manifests, "NetworkPolicy"):
            (rule,) = policy["spec"]["ingress"]
            assert {port["port"] for port in rule["ports"]} == ports.keys()
            assert rule["from"]
        mounts = [mount["mountPath"] for mount in serving["volumeMounts"]]
        for option in ("--store", "--tokens", "--tls-certificate", "--tls-key", "--tls-client-ca"):
            path = arguments.get(option)
            assert path is None or any(Path(path).is_relative_to(mount) for mount in mounts), option
        writable = [mount["mountPath"] for mount in serving["volumeMounts"] if not mount.get("readOnly")]
        for variable in ("NUMBA_CACHE_DIR", "TMPDIR"):
            (value,) = (each["value"] for each in serving["env"] if each["name"] == variable)
            assert value in writable


def test_shards_are_numbered_and_each_has_its_own_replicas(tmp_path: Path) -> None:
    shards = [
        next(argument for argument in container(one)["args"] if argument.startswith("--shard="))
        for one in workloads(render(tmp_path, shards=3))
    ]
    assert shards == ["--shard=1/3", "--shard=2/3", "--shard=3/3"]
    (whole,) = workloads(render(tmp_path))
    assert not any(argument.startswith("--shard") for argument in container(whole)["args"])


def test_probes_ask_what_there_is_and_wait_long_enough(manifests: list[Manifest]) -> None:
    for one in workloads(manifests):
        serving = container(one)
        pod = one["spec"]["template"]["spec"]
        probes = {kind: serving[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")}
        expected = {"startup": "/health", "readiness": "/ready", "liveness": "/health"}
        given = {argument.partition("=")[0] for argument in serving["args"]}
        if "--tls-client-ca" in given:
            # The kubelet has no client certificate, so the probes are commands.
            assert {kind: probe["exec"]["command"][-1] for kind, probe in probes.items()} == expected
        else:
            assert {kind: probe["httpGet"]["path"] for kind, probe in probes.items()} == expected
        for probe in probes.values():
            if "httpGet" in probe:
                assert probe["httpGet"]["port"] == "http"
                assert probe["httpGet"].get("scheme", "HTTP") == ("HTTPS" if "--tls-certificate" in given else "HTTP")
            assert probe["timeoutSeconds"] <= probe["periodSeconds"]
        # Long enough for a slow start, and for Shoal to replace a silent process itself.
        assert probes["startup"]["periodSeconds"] * probes["startup"]["failureThreshold"] >= 240
        assert probes["liveness"]["periodSeconds"] * probes["liveness"]["failureThreshold"] > 30
        (drain,) = (float(a.partition("=")[2]) for a in serving["args"] if a.startswith("--drain-seconds="))
        stop = float(serving["lifecycle"]["preStop"]["exec"]["command"][1])
        assert pod["terminationGracePeriodSeconds"] >= stop + drain + 10
        # Long enough for two failed probes to take the pod out of the service.
        assert stop >= probes["readiness"]["periodSeconds"] * probes["readiness"]["failureThreshold"]


def test_a_pod_may_do_nothing_that_it_need_not(manifests: list[Manifest]) -> None:
    for one in workloads(manifests):
        pod = one["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for each in (*pod["containers"], *pod.get("initContainers", ())):
            context = each["securityContext"]
            assert context["readOnlyRootFilesystem"] is True
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert each["resources"]["requests"]["memory"] == each["resources"]["limits"]["memory"]
    for account in of_kind(manifests, "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False


def mebibytes(quantity: str) -> float:
    number, unit = re.fullmatch(r"([0-9.]+)([MGT]i)", quantity or "").groups()  # type: ignore[union-attr]
    return float(number) * {"Mi": 1, "Gi": 1 << 10, "Ti": 1 << 20}[unit]


def test_a_pod_asks_its_node_for_what_it_may_write_there(manifests: list[Manifest], tmp_path: Path) -> None:
    more = {"storeSizeLimit": "1.5Gi", "temporarySizeLimit": "700Mi", "resources": {"limits": {"memory": "1Gi"}}}
    more["resources"]["requests"] = {"memory": "1Gi"}  # type: ignore[index]
    for one in [*workloads(manifests), *workloads(render(tmp_path, **more)), *plain("stream"), *plain("sync-dynamodb")]:
        pod = one["spec"]["template"]["spec"]
        limits = [volume["emptyDir"]["sizeLimit"] for volume in pod["volumes"] if "emptyDir" in volume]
        assert mebibytes(container(one)["resources"]["requests"]["ephemeral-storage"]) == sum(map(mebibytes, limits))


def test_prometheus_knows_whom_it_asks(tmp_path: Path) -> None:
    def tls_config(**values: Any) -> Any:
        (monitor,) = of_kind(render(tmp_path, **values), "PodMonitor")
        return monitor["spec"]["podMetricsEndpoints"][0].get("tlsConfig")

    asked = {"podMonitor": {"enabled": True}}
    assert tls_config(monitoring=asked) is None
    known = {"ca": {"secret": {"name": "shoal-tls", "key": "ca.crt"}}, "serverName": "prod-shoal.default.svc"}
    assert tls_config(monitoring=asked, tls={"secretName": "shoal-tls"}) == known
    shown = {
        "cert": {"secret": {"name": "probe", "key": "tls.crt"}},
        "keySecret": {"name": "probe", "key": "tls.key"},
    }
    assert tls_config(**VALUES["client certificates"]) == known | shown
    own = {"serverName": "features.example"}
    given = {"podMonitor": {"enabled": True, "tlsConfig": own}}
    assert tls_config(monitoring=given, tls={"secretName": "shoal-tls"}) == own


def plain(name: str) -> list[Manifest]:
    """Return the workloads of a manifest beside the chart, which users apply unchanged."""
    manifests = [*yaml.safe_load_all((CHART.parents[1] / "kubernetes" / f"{name}.yaml").read_text())]
    for manifest in manifests:
        kubernetes_validate.validate(manifest, "1.33", strict=True)
    return workloads(manifests)


@pytest.mark.parametrize(("name", "command"), [("stream", stream_command), ("sync-dynamodb", sync_dynamodb_command)])
def test_what_writes_runs_once_with_arguments_that_its_command_knows(name: str, command: click.Command) -> None:
    (one,) = plain(name)
    running = container(one)
    assert (one["spec"]["replicas"], one["spec"]["strategy"]["type"]) == (1, "Recreate")
    assert running["command"] == ["shoal", command.name]
    given = dict(argument.partition("=")[::2] for argument in running["args"])
    context = command.make_context(str(command.name), [*running["args"]])
    assert all(context.get_parameter_source(of.name or "") for of in command.params)
    pod = one["spec"]["template"]["spec"]
    assert {mount["name"] for mount in running["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    writable = [mount["mountPath"] for mount in running["volumeMounts"] if not mount.get("readOnly")]
    places = [each["value"] for each in running["env"] if each["name"] in ("TMPDIR", "NUMBA_CACHE_DIR")]
    for path in (*places, *filter(None, [given.get("--checkpoint")])):
        assert any(Path(path).is_relative_to(mount) for mount in writable), path
    test_a_pod_may_do_nothing_that_it_need_not([one])


def test_the_rules_of_alerts_are_those_of_the_file(tmp_path: Path) -> None:
    (rule,) = of_kind(render(tmp_path, **VALUES["everything"]), "PrometheusRule")
    assert rule["spec"] == yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())


def test_the_versions_of_chart_and_package_are_one() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = (CHART.parents[2] / "pyproject.toml").read_text()
    assert f'version = "{chart["appVersion"]}"' in project


# --- the container's command, as a process -----------------------------------------------------------------------


def status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def moved(arguments: list[str], pod: Path) -> Iterator[str]:
    """Yield the container's arguments, with the container's mounted paths moved below another directory."""
    for argument in arguments:
        yield re.sub(r"=(/var/|/etc/|/exports/)", lambda found: f"={pod}{found[1]}", argument)


def test_what_a_pod_runs_becomes_ready_as_the_kubelet_sees_it(tmp_path: Path) -> None:
    """The test uses the container's command, arguments, environment and probes, and only the mounted part of its file
    system."""
    pod = tmp_path / "pod"
    port = free_port()
    values = {"root": "/exports/prod", "port": port, "openToAll": True, "workers": 1, "readyUnseenSeconds": 600}
    values |= {"extraVolumeMounts": [{"name": "root", "mountPath": "/exports"}], "pollSeconds": 1}
    (workload,) = workloads(render(tmp_path, **values))
    serving = container(workload)
    for mount in serving["volumeMounts"]:
        (pod / mount["mountPath"].lstrip("/")).mkdir(parents=True, exist_ok=True)
    (pod / "etc/shoal/tokens/tokens").write_text(f"read {'r' * 32} ranker\n")
    root = ExportRoot(pod / "exports/prod")
    view = stores.schema("doc", key="int64", a="int64")
    environment = {
        each["name"]: f"{pod}{each['value']}" for each in serving["env"] if each["name"] != "NUMBA_CACHE_DIR"
    }

    def probe(kind: str) -> int:
        asked = serving[f"{kind}Probe"]["httpGet"]
        ports = {each["name"]: each["containerPort"] for each in serving["ports"]}
        return status(f"http://127.0.0.1:{ports[asked['port']]}{asked['path']}")

    arguments = [*moved(serving["args"], pod)]
    with running([*serving["command"], *arguments], tmp_path / "log", environment) as process:
        eventually(lambda: probe("startup") == 200, "a server that has started")
        assert probe("liveness") == 200
        assert probe("readiness") == 503
        stores.publish_snapshot(root, view, [{"doc_id": 1, "a": 1}])
        eventually(
            lambda: probe("readiness") == 200, lambda: f"a server that is ready: {(tmp_path / 'log').read_text()}"
        )
        assert status(f"http://127.0.0.1:{port}/v1/views") == 401
        assert status(f"http://127.0.0.1:{port}/metrics") == 200
        process.terminate()
        process.wait(workload["spec"]["template"]["spec"]["terminationGracePeriodSeconds"])
        assert process.returncode == 0
    assert list((pod / "var/lib/shoal/store/live").iterdir())
