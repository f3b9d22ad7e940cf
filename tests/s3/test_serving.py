"""A server that follows a root in S3: it notices publications, and a failing root delays only its own deltas."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shoal.engine.format.schema import FeatureService
from shoal.engine.root.export_root import ExportRoot
from tests import stores
from tests.faulty_network import FaultyNetwork
from tests.s3 import server as server_of_objects
from tests.s3.mirroring import mirror
from tests.server.serving import Server, eventually

DOC = stores.schema("doc", key="int64", a="int64")
OTHER = stores.schema("other", key="int64", a="int64")
ROWS: list[stores.Row] = [{"doc_id": number, "a": number} for number in range(1000)]


@pytest.fixture
def root(tmp_path: Path, remote: ExportRoot) -> ExportRoot:
    """An export root in a directory, with its content mirrored to S3."""
    local = ExportRoot(tmp_path / "root")
    stores.publish_snapshot(local, DOC, ROWS)
    stores.publish_snapshot(local, OTHER, [{"other_id": 1, "a": 1}])
    local.publish_services((FeatureService(name="all", features=("doc:*",)),))
    mirror(local, remote)
    return local


def publish(root: ExportRoot, remote: ExportRoot, value: int) -> None:
    stores.publish_delta(root, DOC, [{"doc_id": 1, "a": value}])
    mirror(root, remote)


def seen(server: Server, key: int) -> Any:
    answer = server.lookup(["doc:a"], {"doc_id": [key]})
    assert answer.status == 200, answer.body
    return answer.json["features"]["doc:a"][0]


def push(server: Server, value: int) -> None:
    rows = {"doc_id": [100], "a": [value]}
    answer = server.ask("POST", "/v1/push", {"view": "doc", "rows": rows})
    assert answer.status == 200, answer.body
    assert seen(server, 100) == value


def troubles(server: Server) -> set[str]:
    views = server.ask("GET", "/v1/status").json["views"]
    return {view["trouble"]["code"] if view["trouble"] else "none" for view in views}


def test_a_server_follows_a_root_in_s3_and_lists_it_seldom(
    root: ExportRoot, remote: ExportRoot, network: FaultyNetwork, tmp_path: Path
) -> None:
    with Server(tmp_path / "store", {"root": str(remote)}) as server:
        server.await_views("doc", "other")
        for value in (2001, 2002):
            publish(root, remote, value)
            eventually(lambda value=value: seen(server, 1) == value, "the delta")  # type: ignore[misc]
        mark = len(network.requests)
        asked = "HEAD /features/roots/[0-9a-f]+/doc/deltas/000000000004/"
        eventually(
            lambda: sum(bool(re.match(asked, request)) for request in network.requests[mark:]) > 3, "further polls"
        )
        listed = [request for request in network.requests[mark:] if "list-type=2" in request]
        # Every poll lists the views with a delimiter. The logs are listed at most for the last publications.
        assert sum("delimiter" not in request for request in listed) <= 2, listed


def test_a_root_in_s3_that_fails_or_hangs_holds_up_nothing_but_its_deltas(
    root: ExportRoot, remote: ExportRoot, network: FaultyNetwork, tmp_path: Path
) -> None:
    with Server(tmp_path / "store", {"root": str(remote)}, ready_lag_seconds=0.5) as server:
        server.await_views("doc", "other")
        server.await_ready()
        before = server.record
        # `remote` was opened before `network`, so the test's own publications bypass the failures.
        for number, (hangs, trouble) in enumerate(((False, "RootUnreadable"), (True, "RootSilent")), 1):
            for method in ("GET", "HEAD"):
                network.fail(method=method, times=float("inf"), hangs=hangs, status=None if hangs else 503)
            publish(root, remote, number)
            eventually(lambda trouble=trouble: troubles(server) == {trouble}, "that it is told")  # type: ignore[misc]
            push(server, number)
            assert server.ask("GET", "/ready").status == 200
            network.mend()
            eventually(lambda number=number: seen(server, 1) == number, "the delta")  # type: ignore[misc]
            eventually(lambda: troubles(server) == {"none"}, "that the trouble is over")
            eventually(lambda number=number: told(server, r"s3://\S+: recovered") == number, server.log)  # type: ignore[misc]
        assert (told(server, "RootUnreadable: "), told(server, r"s3://\S+ has not answered")) == (1, 1), server.log
        assert told(server, "(doc|other): RootUnreadable: ") <= 2, server.log
        assert server.record == before, server.log


def told(server: Server, pattern: str) -> int:
    """Return the number of the writer's log lines that begin with a pattern."""
    return len(re.findall(rf"shoal\.writer\[\d+\] {pattern}", server.log))


def test_an_entry_whose_objects_cannot_be_read_takes_no_replica_out(
    root: ExportRoot, remote: ExportRoot, network: FaultyNetwork, disk: Path, tmp_path: Path
) -> None:
    with Server(tmp_path / "store", {"root": str(remote)}, workers=1, ready_lag_seconds=5) as server:
        server.await_views("doc", "other")
        server.await_ready()

        def doc() -> Any:
            return next(view for view in server.ask("GET", "/v1/status").json["views"] if view["name"] == "doc")

        def stands_behind(trouble: str, held_by: str | None) -> bool:
            found = doc()
            code = (found["trouble"] or {}).get("code")
            return code == trouble and found["held_by"] == held_by and found["lag_seconds"] > 6

        # Three faults: S3 denies the data file for good; S3 fails for the data file for a while; the manifest is
        # damaged.
        network.fail(text="part-", status=403, code="AccessDenied", times=float("inf"))
        publish(root, remote, 2001)
        eventually(lambda: stands_behind("FileDamaged", "FileDamaged"), lambda: f"{doc()} {server.log}")
        assert server.ask("GET", "/ready").status == 200
        network.mend()
        eventually(lambda: seen(server, 1) == 2001, "the delta")
        network.fail(text="part-", status=503, times=float("inf"))
        publish(root, remote, 2002)
        eventually(lambda: stands_behind("RootUnreadable", None), lambda: f"{doc()} {server.log}")
        eventually(lambda: server.ask("GET", "/ready").status == 200, "that it is ready")
        network.mend()
        eventually(lambda: seen(server, 1) == 2002, "the delta")
        network.fail(text="part-", status=403, code="AccessDenied", times=float("inf"))
        publish(root, remote, 2003)
        server_of_objects.turn_a_byte(disk, remote.storage.where(f"doc/deltas/{4:012d}/manifest.json"))
        network.mend()
        eventually(lambda: stands_behind("ManifestInvalid", "ManifestInvalid"), lambda: f"{doc()} {server.log}")
        assert server.ask("GET", "/ready").status == 200
        assert told(server, "doc: ") < 12, server.log


def shoal(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shoal", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)


def test_the_commands_load_and_verify_a_root_in_s3_over_a_bad_network(
    root: ExportRoot, remote: ExportRoot, network: FaultyNetwork, tmp_path: Path
) -> None:
    publish(root, remote, 7)
    network.fail(status=500, times=3)
    network.fail(text="part-", cut=100, times=2)
    network.fail(text="part-", slow=0.05, times=2)
    done = shoal("load", "--store", str(tmp_path / "store"), "--from", str(remote), "--json")
    assert done.returncode == 0, done.stderr
    assert [entry["rows"] for entry in json.loads(done.stdout)["applied"]] == [1000, 1, 1]
    done = shoal("verify", str(remote))
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "4 checks, 0 bad"), done.stdout
    manifest = remote.entry("doc", 2)
    remote.storage.replace(f"doc/deltas/{2:012d}/{manifest.files[0].path}", b"bad")
    done = shoal("verify", str(remote))
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, "4 checks, 1 bad"), done.stdout
    done = shoal("load", "--store", str(tmp_path / "store"), "--from", f"{remote}/nothing")
    assert (done.returncode, "is empty" in done.stderr) == (1, True), done.stderr
    done = shoal("reload", "--store", str(tmp_path / "store"))
    assert (done.returncode, done.stdout.count("at seq")) == (0, 2), done.stderr
