"""Commands run where something is missing: an output, address space, a home directory, or a writable disk."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.engine.root.export_root import ExportRoot
from tests import stores
from tests.every_type import USERS, user_rows
from tests.server.serving import Connection, eventually

SHOAL = f"exec {sys.executable} -m shoal"
LOOKUP = {"features": ["users:score"], "entities": {"users_id": [1]}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> ExportRoot:
    root = ExportRoot(tmp_path_factory.mktemp("surroundings") / "root")
    stores.publish_snapshot(root, USERS, user_rows(10))
    return root


@pytest.fixture(scope="module")
def store(root: ExportRoot) -> Path:
    path = Path(str(root)).parent / "store"
    stores.load(path, root)
    return path


@pytest.fixture(scope="module")
def mounts(store: Path) -> Iterator[Path]:
    """A directory where `read-only` is the store, and `full` is a file system without free inodes."""
    directory = store.parent / "mounts"
    script = f"""
        mkdir -p {directory}/read-only {directory}/full && mount --bind {store} {directory}/read-only &&
        mount -o remount,ro,bind {directory}/read-only && mount -t tmpfs -o nr_inodes=2 tmpfs {directory}/full &&
        touch {directory}/full/last
    """
    mounted = subprocess.run(["sh", "-c", script], capture_output=True, text=True)
    try:
        if mounted.returncode:
            pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
        yield directory
    finally:
        for name in ("read-only", "full"):
            subprocess.run(["umount", "--lazy", directory / name], stderr=subprocess.DEVNULL)


def complaint(script: str) -> str:
    """Run a script with a command that fails, and return the one line that the command writes to stderr."""
    failed = subprocess.run(["bash", "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert failed.returncode in (1, 2), failed.stderr
    lines = failed.stderr.splitlines()
    assert len(lines) == 1, failed.stderr
    return lines[0]


@pytest.mark.parametrize("command", ["status", "lookup --features users:score --key users_id=1 --format csv"])
def test_an_output_that_takes_nothing(store: Path, command: str) -> None:
    name, *options = command.split(" ", 1)
    command = f"{SHOAL} {name} --store {store} {' '.join(options)}"
    assert "No space left on device" in complaint(f"{command} > /dev/full")
    assert "output cannot be written: Bad file descriptor" in complaint(f"{command} >&-")


def test_less_address_space_than_a_store_takes(store: Path) -> None:
    message = complaint(f"ulimit -v 30000000; {SHOAL} serve --port 0 --store {store}")
    assert "`ulimit -v`" in message
    assert "SHOAL_LIVE_MAP_GIB" in message
    message = complaint(f"SHOAL_LIVE_MAP_GIB=much {SHOAL} status --store {store}")
    assert "SHOAL_LIVE_MAP_GIB is 'much'; give a whole number of GiB" in message


def test_a_disk_that_takes_nothing(mounts: Path, root: ExportRoot) -> None:
    for command in ("serve --port 0", f"load --from {root}"):
        message = complaint(f"{SHOAL} {command} --store {mounts}/read-only")
        assert "read-only: mount it for writing" in message
    message = complaint(f"{SHOAL} load --from {root} --store {mounts}/full/store")
    assert "no inodes left; remove files from it" in message


def test_a_server_with_as_little_as_it_needs(store: Path) -> None:
    """The server has no output, a log that accepts nothing, no home directory, and just enough address space."""
    surroundings = {"HOME": "/proc/none", "SHOAL_LIVE_MAP_GIB": "4"}
    address = store.parent / "socket"
    script = f"ulimit -v 30000000; {SHOAL} serve --store {store} --unix {address} --workers 1 >&- 2>/dev/full"
    server = subprocess.Popen(["bash", "-c", script], env=os.environ | surroundings)
    try:
        eventually(address.is_socket, "the server's socket")
        connection = Connection(f"unix:{address}")
        assert eventually(lambda: answers(connection), "an answer")
        worker = json.loads((store / "run" / "server.json").read_text())["workers"][0]
        os.kill(worker, signal.SIGKILL)
        connection = Connection(f"unix:{address}")
        assert eventually(lambda: answers(connection), "an answer of the next worker")
        server.terminate()
        assert server.wait(60) == 0
    finally:
        server.kill()


def answers(connection: Connection) -> bool:
    return connection.ask("POST", "/v1/lookup", LOOKUP).status == 200
