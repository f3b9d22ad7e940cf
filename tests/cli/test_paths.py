"""A command that gets a path of the wrong kind says so in one line, and writes nothing there."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from shoal import cli
from shoal.engine.base.errors import ShoalError
from shoal.engine.root.export_root import ExportRoot
from tests import stores

VIEW = stores.schema("doc", a="int32")
VIEWS = """\
views:
- name: doc
  join_keys: [{name: doc_id, type: string}]
  features: [{name: a, type: int32}]
  timestamp_field: at
"""
BATCH = f"{VIEWS}  source: {{path: rows}}\n"
STREAM = f"{VIEWS}  stream: {{format: json, path: rows, columns: 'doc_id STRING, at TIMESTAMP, a INT'}}\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an export root, a store, a backup of the store, and paths where none of these can exist."""
    place = tmp_path_factory.mktemp("paths")
    root = ExportRoot(place / "root")
    stores.publish_snapshot(root, VIEW, [{"doc_id": "a", "a": 1}])
    stores.load(place / "store", root)
    run(place, "backup --store store --to backup", code=0)
    (place / "file").write_text("")
    (place / "loop").symlink_to(place / "loop")
    (place / "batch.yaml").write_text(BATCH)
    (place / "stream.yaml").write_text(STREAM)
    return place


def run(place: Path, command: str, *, code: int) -> str:
    """Run a command line in this process and in a directory, assert its exit code, and return its output or error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        result = CliRunner().invoke(cli.shoal, command.split())
    error = result.exception
    if isinstance(error, ShoalError):
        assert (error.exit_code, code) == (code, code), error
        return str(error)
    assert error is None or isinstance(error, SystemExit), repr(error)
    assert result.exit_code == code, result.output
    return result.output


def contents(place: Path) -> dict[str, bytes]:
    """Return the content of all files of the root, the store and the backup, except the files that readers lock."""
    paths = (path for name in ("root", "store", "backup") for path in (place / name).rglob("*"))
    return {str(path): path.read_bytes() for path in paths if path.is_file() and not path.name.startswith("lock")}


IS_ROOT, IS_STORE, IS_BACKUP = "root is an export root", "store is a store, not an export root", "backup is a backup"
SWAPPED = [
    ("load --store root --from store", f"{IS_ROOT}|{IS_STORE}"),
    ("load --store root --from root", IS_ROOT),
    ("load --store new --from store", IS_STORE),
    ("load --store backup --from root", IS_BACKUP),
    ("serve --store root --from store --port 0", IS_ROOT),
    ("serve --store root --port 0", IS_ROOT),
    ("serve --store backup --from root --port 0", IS_BACKUP),
    ("backup --store root --to new", IS_ROOT),
    ("backup --store store --to root", "root exists already"),
    ("restore --from backup --to root", "root exists already"),
    ("restore --from root --to new", "root is not a backup"),
    ("restore --from store --to new", "store is not a backup"),
    ("status --store root", IS_ROOT),
    ("lookup --store root --features doc:* --key doc_id=a", IS_ROOT),
    ("reload --store root", IS_ROOT),
    ("store accept-loss --store root", IS_ROOT),
    ("sync-dynamodb --from store --once", IS_STORE),
    ("export --views batch.yaml --to store", IS_STORE),
    ("stream --views stream.yaml --to store --checkpoint new", IS_STORE),
]


@pytest.mark.parametrize(("command", "message"), SWAPPED)
def test_a_store_a_root_and_a_backup_are_not_taken_for_each_other(place: Path, command: str, message: str) -> None:
    before = contents(place)
    said = run(place, command, code=1 if command.startswith("restore") and "not a backup" in message else 2)
    assert any(part in said for part in message.split("|")), said
    assert "load --store root" not in said, "it advises to write into the root"
    assert contents(place) == before
    assert not (place / "new").exists()


@pytest.mark.parametrize("path", ["file", "file/below", "loop", "/proc/shoal/x", "n" * 300, "s3://bucket/x", "S3:/x"])
@pytest.mark.parametrize(
    "command",
    [
        "load --store PATH --from root",
        "serve --store PATH --from root --port 0",
        "backup --store store --to PATH",
        "restore --from backup --to PATH",
        "restore --from PATH --to new",
        "status --store PATH",
        "lookup --store PATH --features doc:* --key doc_id=a",
        "reload --store PATH",
        "store accept-loss --store PATH",
        "verify PATH",
        "load --store new --from PATH",
        "sync-dynamodb --from PATH --once",
    ],
)
def test_a_path_at_which_nothing_can_be_is_told(place: Path, command: str, path: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        patch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        patch.chdir(place)
        result = CliRunner().invoke(cli.shoal, command.replace("PATH", path).split())
    assert isinstance(result.exception, ShoalError | SystemExit), repr(result.exception)
    assert result.exit_code != 0
    said = str(result.exception) if isinstance(result.exception, ShoalError) else result.output
    assert path in said, said
    assert not (place / "new").exists() or not any((place / "new").iterdir())


def test_a_check_that_checked_nothing_fails(place: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "views" / "doc" / "deltas").mkdir(parents=True)
    for name in ("none", "empty", "views"):
        assert "with published entries" in run(tmp_path, f"verify {name}", code=1)
    # An earlier release left such a directory when a server was started with the store and the root swapped.
    root = ExportRoot(tmp_path / "root")
    stores.load(tmp_path / "root", ExportRoot(place / "root"))
    stores.publish_snapshot(ExportRoot(tmp_path / "made"), VIEW, [])
    for entry in (tmp_path / "made").iterdir():
        entry.rename(root.path / entry.name)
    assert "holds an export root, and the files of a store" in run(tmp_path, "verify root", code=2)


def test_a_process_says_it_in_one_line(place: Path) -> None:
    command = [sys.executable, "-m", "shoal", "load", "--store", str(place / "file"), "--from", str(place / "root")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith(f"shoal: {place}/file cannot be written to: ")
