"""The commands as a person or a script runs them: real processes, their output, and their exit codes."""

import csv
import io
import json
import subprocess
import sys
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import pytest

from shoal.engine.root.export_root import ExportRoot
from tests.server.serving import Server
from tests.stores import NOW, TIMESTAMP, load, publish_delta, publish_snapshot, schema

DOCS = schema("docs", clicks="int64", title="string", tags="list<string>")
USERS = schema("users", key="int64", ttl=timedelta(days=30), score="float32")


def shoal(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command, assert its exit code, and return the finished process."""
    command = [sys.executable, "-m", "shoal", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr + done.stdout
    return done


@pytest.fixture
def root(tmp_path: Path) -> ExportRoot:
    """A root with a snapshot and a delta of docs, and a snapshot of users with old rows."""
    root = ExportRoot(tmp_path / "root")
    rows = [{"docs_id": f"d{i}", "clicks": i, "title": f"title {i}", "tags": ["a", "b"]} for i in range(200)]
    publish_snapshot(root, DOCS, rows)
    publish_delta(root, DOCS, [{"docs_id": "d1", "clicks": -1, "title": "new", "tags": []}], [{"docs_id": "d2"}])
    publish_snapshot(root, USERS, [{"users_id": i, "score": i / 2, TIMESTAMP: NOW} for i in range(-5, 5)])
    return root


@pytest.fixture
def store(root: ExportRoot, tmp_path: Path) -> Path:
    """A store that is loaded with everything in the root."""
    load(tmp_path / "store", root)
    return tmp_path / "store"


def test_load_says_what_it_applied_and_a_second_load_that_nothing_is_new(root: ExportRoot, tmp_path: Path) -> None:
    store = tmp_path / "store"
    first = shoal("load", "--store", store, "--from", root, "--json")
    applied = [(entry["view"], entry["kind"], entry["seq"]) for entry in json.loads(first.stdout)["applied"]]
    assert applied == [("docs", "snapshot", 1), ("docs", "delta", 2), ("users", "snapshot", 1)]
    second = shoal("load", "--store", store, "--from", root)
    assert "has everything" in second.stdout


def test_load_shows_plain_lines_where_there_is_no_terminal(root: ExportRoot, tmp_path: Path) -> None:
    done = shoal("load", "--store", tmp_path / "store", "--from", root)
    assert "docs: snapshot 1: 200 rows" in done.stderr
    assert "\x1b" not in done.stderr + done.stdout


def test_load_of_a_root_that_is_not_there_names_it(tmp_path: Path) -> None:
    done = shoal("load", "--store", tmp_path / "store", "--from", tmp_path / "nowhere", code=1)
    assert str(tmp_path / "nowhere") in done.stderr
    assert not (tmp_path / "store").exists()


def test_lookup_tells_present_missing_and_too_old_apart(store: Path) -> None:
    arguments = ["--features", "docs:clicks,users:score", "--key", "docs_id=d1", "--key", "docs_id=d2"]
    done = shoal("lookup", "--store", store, *arguments, "--key", "users_id=-3", "--json")
    rows = {(row["docs_id"], row["feature"]): row for row in json.loads(done.stdout)["rows"]}
    assert rows["d1", "docs:clicks"]["value"] == -1
    assert rows["d1", "docs:clicks"]["status"] == "PRESENT"
    assert rows["d2", "docs:clicks"]["status"] == "NOT_FOUND"
    assert rows["d1", "users:score"]["status"] == "OUTSIDE_MAX_AGE"
    assert rows["d1", "users:score"]["value"] is None
    assert rows["d1", "users:score"]["age_seconds"] > 30 * 86400


def test_lookup_serves_old_rows_to_who_accepts_them(store: Path) -> None:
    lookup = ["lookup", "--store", store, "--features", "users:score", "--key", "users_id=4", "--json"]
    assert json.loads(shoal(*lookup, "--stale", "serve").stdout)["rows"][0]["value"] == 2.0
    assert json.loads(shoal(*lookup, "--max-age", "5000d").stdout)["rows"][0]["status"] == "PRESENT"
    shoal(*lookup, "--stale", "fail", code=1)


def test_lookup_writes_csv_that_a_csv_reader_understands(store: Path) -> None:
    done = shoal("lookup", "--store", store, "--features", "docs:*", "--key", "docs_id=d7", "--format", "csv")
    rows = {row["feature"]: row["value"] for row in csv.DictReader(io.StringIO(done.stdout))}
    assert rows == {"docs:clicks": "7", "docs:title": "title 7", "docs:tags": '["a", "b"]'}


def test_lookup_explains_what_wrote_a_row_and_what_it_was_before(store: Path) -> None:
    done = shoal("lookup", "--store", store, "--features", "docs:*", "--key", "docs_id=d1", "--explain", "--json")
    (history,) = json.loads(done.stdout)["history"]["docs"]
    assert [(row["origin"]["kind"], row["origin"]["seq"], row["values"]["clicks"]) for row in history] == [
        ("delta", 2, -1),
        ("snapshot", 1, 1),
    ]
    table = shoal("lookup", "--store", store, "--features", "docs:*", "--key", "docs_id=d2", "--explain").stdout
    assert "tombstone" in table
    assert "clicks=2" in table


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--features", "docs:nope", "--key", "docs_id=d1"], 2, "it has clicks, title, tags"),
        (["--features", "nope:x", "--key", "docs_id=d1"], 2, "it has docs, users"),
        (["--service", "nope", "--key", "docs_id=d1"], 2, "feature service 'nope'"),
        (["--features", "users:*", "--key", "users_id=x"], 2, "not a whole number"),
        (["--features", "docs:*", "--key", "docs_id"], 2, "join_key=value"),
        (["--features", "docs:*", "--key", "users_id=1"], 2, "they have docs_id"),
        (["--key", "docs_id=1"], 2, "--features or --service"),
        (["--features", "docs:*", "--key", "docs_id=1", "--max-age", "soon"], 2, "12h"),
    ],
)
def test_a_wrong_lookup_gets_one_error_that_helps(store: Path, arguments: list[str], code: int, message: str) -> None:
    done = shoal("lookup", "--store", store, *arguments, code=code)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_lookup_in_no_store_makes_none(tmp_path: Path) -> None:
    shoal("lookup", "--store", tmp_path / "x", "--features", "a:b", "--key", "k=1", code=1)
    assert not (tmp_path / "x").exists()


def test_reload_goes_back_to_a_kept_generation_and_on_again(root: ExportRoot, store: Path) -> None:
    newest = publish_snapshot(root, DOCS, [{"docs_id": "d1", "clicks": 1000}])
    load(store, root)
    status = json.loads(shoal("status", "--store", store, "--json").stdout)
    (kept,) = next(view["kept"] for view in status["views"] if view["name"] == "docs")
    back = json.loads(shoal("reload", "--store", store, "--view", "docs", "--snapshot", kept, "--json").stdout)
    assert back["views"][0]["pinned"]
    assert _clicks(store) == 1
    shoal("load", "--store", store, "--from", root)
    assert _clicks(store) == 1, "a pinned view stays"
    on = json.loads(shoal("reload", "--store", store, "--view", "docs", "--json").stdout)
    assert (on["views"][0]["generation"], on["views"][0]["pinned"]) == (newest.snapshot_id, False)
    assert _clicks(store) == 1000
    done = shoal("reload", "--store", store, "--view", "docs", "--snapshot", "nope", code=1)
    assert newest.snapshot_id in done.stderr


@pytest.mark.parametrize("served", [False, True])
def test_reload_tries_every_view_and_fails_if_one_does(root: ExportRoot, store: Path, served: bool) -> None:
    damaged = publish_delta(root, DOCS, [{"docs_id": "d5", "clicks": 5}])
    (root.directory(damaged) / damaged.files[0].path).write_bytes(b"not Parquet")
    publish_delta(root, USERS, [{"users_id": 1, "score": 9.0}])
    with Server(store, {"root": str(root)}) if served else nullcontext() as server:
        done = shoal("reload", "--store", store, "--json", code=1)
        by_view = {answer["view"]: answer for answer in json.loads(done.stdout)["views"]}
        assert by_view["docs"]["error"]["code"] == "FileDamaged"
        assert by_view["users"]["applied_seq"] == 2
        assert "not readable as Parquet" in done.stderr
        plain = shoal("reload", "--store", store, code=1)
        assert "docs: failed: FileDamaged: " in plain.stdout
        assert "users: at seq 2" in plain.stdout
        if server is not None:
            answer = server.ask("POST", "/v1/reload", {})
            assert (answer.status, answer.error[0]) == (500, "FileDamaged")
            assert [view["view"] for view in answer.json["views"]] == ["docs", "users"]


def _clicks(store: Path) -> object:
    done = shoal("lookup", "--store", store, "--features", "docs:clicks", "--key", "docs_id=d1", "--json")
    return json.loads(done.stdout)["rows"][0]["value"]


def test_status_ends_with_1_while_a_view_does_not_move_on(root: ExportRoot, store: Path) -> None:
    assert "no server runs" in shoal("status", "--store", store).stdout
    damaged = publish_delta(root, DOCS, [{"docs_id": "d5", "clicks": 5}])
    (root.directory(damaged) / damaged.files[0].path).write_bytes(b"not Parquet")
    assert "not readable" in shoal("load", "--store", store, "--from", root, code=1).stderr
    status = shoal("status", "--store", store, code=1)
    assert "trouble with docs" in status.stdout
    assert "FileDamaged" in status.stdout
    assert _clicks(store) == -1, "the last good version goes on serving"


def test_verify_finds_what_is_bad(root: ExportRoot, store: Path) -> None:
    assert "0 bad" in shoal("verify", root).stdout
    publish_snapshot(root, DOCS, [{"docs_id": "d1"}])
    load(store, root)
    kept = shoal("verify", store).stdout
    assert "0 bad" in kept
    assert "(kept)" in kept
    part = next(root.path.glob("docs/snapshots/*-*/part-*.parquet"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    done = json.loads(shoal("verify", root, "--json", code=1).stdout)
    assert done["bad"] == 1
    (bad,) = [check for check in done["checks"] if check["problem"]]
    assert part.name in bad["problem"]
    data = next(store.glob("generations/docs/*/data.mdb"))
    content = bytearray(data.read_bytes())
    content[content.index(b"SHOALSEG") + 1000] ^= 1
    data.write_bytes(content)
    assert "checksum" in shoal("verify", store, code=1).stdout
    shoal("verify", root.path.parent / "nothing", code=1)


def test_the_help_names_every_command() -> None:
    listed = shoal("--help").stdout
    assert all(name in listed for name in ("export", "load", "lookup", "reload", "serve", "status", "verify"))
    assert shoal("--version").stdout.startswith("shoal")


def test_a_store_stays_the_shard_that_it_was_loaded_as(root: ExportRoot, tmp_path: Path) -> None:
    store = tmp_path / "store"
    loaded = json.loads(shoal("load", "--store", store, "--from", root, "--shard", "2/3", "--json").stdout)
    assert 0 < loaded["applied"][0]["rows"] < 200
    assert "shard 2/3" in shoal("status", "--store", store).stdout
    for command in (["load", "--from", root], ["serve", "--port", 0]):
        refused = shoal(*command, "--store", store, "--shard", "1/3", code=2)
        assert "holds shard 2/3, and cannot become shard 1/3" in refused.stderr
