"""What clients see while the store under the server changes, from no version to the first one and later ones."""

import threading
from pathlib import Path

from shoal.engine.root.export_root import ExportRoot
from tests import stores
from tests.every_type import USERS, user_rows
from tests.server.serving import Server, eventually


def test_a_server_without_a_store_becomes_ready(tmp_path: Path) -> None:
    store = tmp_path / "store"
    root = ExportRoot(tmp_path / "root")
    with Server(store) as server:
        assert server.ask("GET", "/health").json == {"status": "alive"}
        answer = server.ask("GET", "/ready")
        assert (answer.status, answer.error[0]) == (503, "StoreNotFound")
        assert "x-shoal-version" not in answer.headers
        answer = server.lookup(["users:score"], {"users_id": [1]})
        assert (answer.status, answer.error[0]) == (503, "StoreNotFound")
        assert f"{store} is not a Shoal store; `shoal load --store {store} --from ROOT` makes one" in answer.error[1]
        assert server.ask("GET", "/v1/views").status == 503
        assert server.ask("GET", "/v1/status").json["version"] is None
        assert b"shoal_store_version 0.0" in server.ask("GET", "/metrics").body
        answer = server.ask("POST", "/v1/reload", {})
        assert (answer.status, answer.error[0]) == (503, "WriterUnavailable")
        assert "`shoal serve` runs one" in answer.error[1]

        stores.publish_snapshot(root, USERS, user_rows(3))
        stores.load(store, root)
        # No worker lags behind another, so the readiness of one worker holds for all.
        assert [server.ask("GET", "/ready").status for _ in range(10)] == [200] * 10
        assert server.lookup(["users:score"], {"users_id": [1]}).json["features"] == {"users:score": [0.25]}


def test_versions_never_go_back_and_are_never_mixed(tmp_path: Path) -> None:
    """Every row contains its step twice, so a mixture of two versions in one answer would be visible."""
    store = tmp_path / "store"
    root = ExportRoot(tmp_path / "root")
    view = stores.schema("steps", first="int64", second="int64")
    keys = [f"key-{number}" for number in range(40)]

    def rows(step: int) -> list[stores.Row]:
        return [{"steps_id": key, "first": step, "second": -step} for key in keys]

    stores.publish_snapshot(root, view, rows(0))
    stores.load(store, root)
    with Server(store) as server:
        server.await_ready()
        done = threading.Event()
        problems = []
        seen = set()

        def watch() -> None:
            version, step = 0, 0
            with server.connection() as connection:
                while not done.is_set():
                    answer = connection.ask(
                        "POST", "/v1/lookup", {"features": ["steps:*"], "entities": {"steps_id": keys}}
                    )
                    first = set(answer.json["features"]["steps:first"])
                    second = {-value for value in answer.json["features"]["steps:second"]}
                    if len(first) != 1 or first != second or answer.version < version or min(first) < step:
                        problems.append((answer.version, version, first, second))
                    version = answer.version
                    step = min(first)
                    seen.add(step)

        watchers = [threading.Thread(target=watch) for _ in range(4)]
        for watcher in watchers:
            watcher.start()
        for step in range(1, 13):
            (stores.publish_delta if step % 6 else stores.publish_snapshot)(root, view, rows(step))
            stores.load(store, root)
        eventually(lambda: 12 in seen, "the last step")
        done.set()
        for watcher in watchers:
            watcher.join()
    assert not problems
    assert len(seen) > 2
