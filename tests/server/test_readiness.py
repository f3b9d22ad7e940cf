"""A server is ready once it has caught up with its export root. A fault that all replicas share makes none of them
unready."""

import os
import re
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from shoal import FeatureStore
from shoal.engine.base.errors import NotCaughtUp
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.server.readiness import Readiness
from shoal.engine.server.settings import server_settings
from shoal.engine.status.replication import (
    FollowState,
    ReplicationStatus,
    forget_old_replication,
    read_replication,
    replication_path,
    write_replication,
)
from tests import stores
from tests.server.serving import Server, eventually, standing_still

VIEW = stores.schema("doc", key="int64", a="int64")
OTHER = stores.schema("other", key="int64", a="int64")


def rows(value: int) -> list[stores.Row]:
    return [{"doc_id": n, "a": value} for n in range(20)]


@pytest.fixture
def root(tmp_path: Path) -> ExportRoot:
    root = ExportRoot(tmp_path / "root")
    stores.publish_snapshot(root, VIEW, rows(0))
    stores.publish_snapshot(root, OTHER, [{"other_id": 1, "a": 0}])
    return root


def following(store: Path, root: ExportRoot, **settings: Any) -> Server:
    return Server(store, {"root": str(root)}, workers=1, **settings)


def refusal(server: Server) -> str | None:
    answer = server.ask("GET", "/ready")
    return None if answer.status == 200 else answer.error[1]


def await_refusal(server: Server, pattern: str) -> None:
    eventually(
        lambda: re.search(pattern, refusal(server) or ""), lambda: f"a refusal like {pattern}; it is {refusal(server)}"
    )


def gauge(server: Server, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", server.ask("GET", "/metrics").body.decode(), re.MULTILINE)
    assert found, name
    return float(found[1])


def behind(server: Server, view: str) -> Any:
    (found,) = (one for one in server.ask("GET", "/v1/status").json["views"] if one["name"] == view)
    return {"entries": found["lag_entries"], "seconds": found["lag_seconds"], "held_by": found["held_by"]}


# --- the whole server --------------------------------------------------------------------------------------------


def test_a_server_that_was_never_compared_with_its_root_is_not_ready(store: Path, root: ExportRoot) -> None:
    """The store has all of the data, but the server cannot know this yet."""
    away = root.path.with_name("away")
    root.path.rename(away)
    with following(store, root) as server:
        await_refusal(server, "was not read yet.*: export root .* does not exist")
        assert server.lookup(["doc:a"], {"doc_id": [1]}).status == 200
        stores.publish_delta(ExportRoot(away), VIEW, rows(1))
        away.rename(root.path)
        server.await_ready()
        assert server.lookup(["doc:a"], {"doc_id": [1]}).json["features"]["doc:a"] == [1]
        assert gauge(server, 'shoal_view_lag_entries{view="doc"}') == 0
        assert behind(server, "doc") == {"entries": 0, "seconds": 0.0, "held_by": None}


def test_a_new_server_says_what_keeps_its_store_empty(tmp_path: Path) -> None:
    root = ExportRoot(tmp_path / "root")
    with following(tmp_path / "store", root) as server:
        await_refusal(server, "nothing was loaded into .* yet: export root .*/root does not exist")
        root.path.symlink_to(server.store)
        await_refusal(server, "nothing was loaded into .* yet: .*/root is a store, not an export root")
        root.path.unlink()
        root.path.mkdir()
        await_refusal(server, "nothing was loaded into .* yet: .*/root has no views yet; `shoal export")
        bad = stores.publish_snapshot(root, VIEW, rows(0))
        (root.directory(bad) / bad.files[0].path).write_bytes(b"bad")
        await_refusal(server, "nothing was loaded into .* yet: doc: .*part-00000.parquet is not readable as Parquet")
        stores.publish_snapshot(root, VIEW, rows(1))
        server.await_ready()
        told = [line for line in server.log.splitlines() if "WARNING" in line or "ERROR" in line]
        patterns = ["does not exist", "has no views yet", "doc: FileDamaged"]
        assert [sum(pattern in line for line in told) for pattern in patterns] == [1, 1, 1], server.log
        assert not any("shoal.worker" in line for line in told), server.log


def test_a_root_that_cannot_be_read_leaves_a_ready_server_ready(store: Path, root: ExportRoot) -> None:
    with (
        following(store, root) as server,
        following(store.with_name("impatient"), root, ready_unseen_seconds=1.5) as impatient,
    ):
        server.await_ready()
        impatient.await_ready()
        away = root.path.with_name("away")
        root.path.rename(away)
        await_refusal(impatient, r"was last read \d+ s ago, and ready_unseen_seconds is 1.5")
        assert refusal(server) is None
        assert gauge(server, "shoal_root_unseen_seconds") > 1
        # A container that is restarted now had followed the root until it became unreadable.
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(30)
        with following(store, root) as again:
            assert eventually(lambda: refusal(again) is None, "the same, restarted")
        away.rename(root.path)
        impatient.await_ready()


def test_an_entry_that_no_replica_can_apply_takes_none_out_and_lets_new_ones_in(store: Path, root: ExportRoot) -> None:
    options = {"ready_lag_seconds": 0.5}
    with following(store, root, **options) as server:
        server.await_ready()
        with standing_still(server.record.writer or 0):
            bad = stores.publish_delta(root, VIEW, rows(1))
            stores.falsify(root, bad, parent="f" * 32)
        eventually(lambda: behind(server, "doc")["held_by"], "the entry that is held")
        eventually(lambda: behind(server, "doc")["seconds"] > 1, "more than the most seconds")
        assert refusal(server) is None
        assert gauge(server, 'shoal_view_lag_entries{view="doc"}') == 1
        assert gauge(server, 'shoal_view_held{view="doc"}') == 1
        assert gauge(server, 'shoal_view_lag_seconds{view="doc"}') > 1
        with following(store.with_name("new"), root, **options) as new:
            new.await_ready()
            assert behind(new, "doc")["held_by"] == "ForeignDelta"
        printed = subprocess.run(
            [sys.executable, "-m", "shoal", "status", "--store", str(store)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert re.search(r"^doc .* 1, .+ \(held\)", printed.stdout, re.MULTILINE), printed.stdout


def test_a_server_whose_writer_applies_nothing_more_is_taken_out_and_comes_back(store: Path, root: ExportRoot) -> None:
    dying = {"SHOAL_FAILPOINT": "commit.written"}
    with following(store, root, ready_lag_seconds=1.0, environment=dying) as server:
        server.await_ready()
        stores.publish_delta(root, VIEW, rows(1))
        await_refusal(server, r"^doc: 1 entry behind, the oldest published \d+ s ago; ready_lag_seconds is 1$")
        assert gauge(server, 'shoal_view_lag_seconds{view="doc"}') > 1
        assert server.ask("GET", "/ready").error[0] == "NotCaughtUp"
    with following(store, root, ready_lag_seconds=1.0) as server:
        server.await_ready()


# --- single cases ------------------------------------------------------------------------------------------------


def judged(
    store: Path,
    view: FollowState | None,
    *,
    seen: float = 0.0,
    unreadable_since: datetime | None = None,
    **settings: Any,
) -> str | None:
    """Return the reason why a store is not ready, or None.

    The store has applied entry 1 of both views. `view` is the replication state of `doc`.
    """
    now = datetime.now(UTC)
    views = {"other": FollowState(newest_seq=1, caught_up=True)} | ({"doc": view} if view is not None else {})
    seen_at = now - timedelta(seconds=seen)
    write_replication(
        store, ReplicationStatus(root="root", seen_at=seen_at, unreadable_since=unreadable_since, views=views)
    )
    readiness = Readiness(server_settings(store=store, **settings), follows=True)
    try:
        readiness.check(FeatureStore.open(store).version())
    except NotCaughtUp as error:
        return str(error)
    return None


def ago(seconds: float) -> datetime:
    return datetime.now(UTC) - timedelta(seconds=seconds)


def test_what_counts_and_what_does_not(store: Path) -> None:
    late = FollowState(newest_seq=4, pending_since=ago(400), caught_up=True)
    assert judged(store, late) == ("doc: 3 entries behind, the oldest published 400 s ago; ready_lag_seconds is 300")
    assert judged(store, late, ready_lag_seconds=500) is None
    assert judged(store, late, ready_lag_seconds=0) is None
    assert judged(store, late.model_copy(update={"held_by": "DeltaGap"})) is None
    # A server that has just started must first have caught up once.
    assert judged(store, late.model_copy(update={"pending_since": ago(1), "caught_up": False})) is not None
    # While the root fails, nothing can be applied: a view is judged as of the time when the failure began.
    for since in (ago(399), ago(1)):
        frozen = late.model_copy(update={"unreadable_since": since})
        assert (judged(store, frozen) is None) == (since < ago(2)), since
        assert (judged(store, late, unreadable_since=since) is None) == (since < ago(2)), since
    assert "last read 50 s ago" in (
        judged(store, late.model_copy(update={"unreadable_since": ago(50)}), ready_unseen_seconds=40) or ""
    )
    # An applied entry is not pending, even if the writer has not noted that yet.
    assert judged(store, late.model_copy(update={"newest_seq": 1})) is None


def test_a_snapshot_takes_no_replica_out_that_had_caught_up(store: Path) -> None:
    loading = FollowState(newest_seq=2, pending_since=ago(3600), caught_up=True, is_loading=True)
    assert judged(store, loading) is None
    assert judged(store, loading.model_copy(update={"caught_up": False})) is not None
    # Each replica has many entries to apply at once that were published while the snapshot was loading.
    after = {"newest_seq": 50, "is_loading": False}
    assert judged(store, loading.model_copy(update=after | {"excused_until": ago(10)})) is None
    assert judged(store, loading.model_copy(update=after | {"excused_until": ago(301)})) is not None
    fresh = after | {"excused_until": ago(10), "caught_up": False}
    assert judged(store, loading.model_copy(update=fresh)) is not None


def test_a_view_of_which_nothing_is_loaded_is_waited_for(store: Path) -> None:
    now = datetime.now(UTC)
    absent = {"absent": FollowState(newest_seq=7, pending_since=now), "unknown": FollowState()}
    write_replication(store, ReplicationStatus(root="root", seen_at=now, views=absent))
    with pytest.raises(NotCaughtUp, match="absent: not loaded yet, 7 entries behind; unknown: not comp"):
        Readiness(server_settings(store=store), follows=True).check(FeatureStore.open(store).version())


def test_what_a_server_of_long_ago_knew_does_not_count(store: Path) -> None:
    write_replication(store, ReplicationStatus(root="root"))
    forget_old_replication(store)
    assert read_replication(store) is not None
    os.utime(replication_path(store), (0, 0))
    forget_old_replication(store)
    assert read_replication(store) is None
