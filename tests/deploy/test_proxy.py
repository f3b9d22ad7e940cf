"""HAProxy in front of two replicas, with the shipped configuration."""

import json
import os
import shutil
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from shoal.engine.root.export_root import ExportRoot
from tests import stores
from tests.deploy.chart import DEPLOY
from tests.deploy.programs import running
from tests.s3.server import free_port
from tests.server.serving import Server, eventually

VIEW = stores.schema("doc", key="int64", a="int64")
HAPROXY = shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin")
pytestmark = pytest.mark.skipif(HAPROXY is None, reason="there is no HAProxy: apt-get install haproxy")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> ExportRoot:
    root = ExportRoot(tmp_path_factory.mktemp("proxy") / "root")
    stores.publish_snapshot(root, VIEW, [{"doc_id": 1, "a": 7}])
    return root


@pytest.fixture(scope="module")
def replicas(root: ExportRoot) -> Iterator[list[Server]]:
    settings: dict[str, Any] = {"workers": 1, "ready_unseen_seconds": 2.0, "request_timeout_ms": 5_000}
    servers = [Server(root.path.with_name(name), {"root": str(root)}, **settings) for name in ("one", "two")]
    with servers[0], servers[1]:
        for server in servers:
            server.await_ready()
        yield servers


@pytest.fixture(scope="module")
def proxy(replicas: list[Server]) -> Iterator[str]:
    """The URL of the proxy, once it answers."""
    assert HAPROXY is not None
    port = free_port()
    addresses = {
        f"SHOAL_{number}": server.record.address.removeprefix("http://") for number, server in enumerate(replicas, 1)
    }
    log = replicas[0].store.with_name("haproxy.log")
    with running([HAPROXY, "-f", str(DEPLOY / "haproxy.cfg")], log, addresses | {"SHOAL_LISTEN": f"127.0.0.1:{port}"}):
        eventually(lambda: lookup(f"http://127.0.0.1:{port}") == 7, "an answer by the proxy")
        yield f"http://127.0.0.1:{port}"


def lookup(url: str) -> object:
    """Return the feature's value, or a description of the error."""
    body = json.dumps({"features": ["doc:a"], "entities": {"doc_id": [1]}}).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/lookup", body), timeout=10) as answer:
            return json.load(answer)["features"]["doc:a"][0]
    except urllib.error.HTTPError as error:
        return f"status {error.code}"
    except OSError as error:
        return str(error)


def test_where_no_replica_is_ready_all_are_asked(proxy: str, replicas: list[Server], root: ExportRoot) -> None:
    """Old features are better than none."""
    away = root.path.with_name("away")
    root.path.rename(away)
    for server in replicas:
        eventually(lambda server=server: server.ask("GET", "/ready").status == 503, "one that is not ready")  # type: ignore[misc]
    assert [lookup(proxy) for _ in range(30)] == [7] * 30
    away.rename(root.path)
    for server in replicas:
        server.await_ready()


def test_no_lookup_fails_while_one_replica_hangs_or_dies(proxy: str, replicas: list[Server]) -> None:
    (worker,) = replicas[0].record.workers
    os.kill(worker, signal.SIGSTOP)
    assert [lookup(proxy) for _ in range(30)] == [7] * 30
    os.kill(worker, signal.SIGCONT)
    replicas[0].kill()
    assert [lookup(proxy) for _ in range(30)] == [7] * 30
