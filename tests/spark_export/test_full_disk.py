"""An export root on a full disk: the export says so and leaves nothing behind; the next one publishes everything."""

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from shoal.engine.base.errors import SparkFailed
from tests.spark_export.lab import KEY, TIMESTAMP, Lab, ago


@pytest.fixture
def small(lab: Lab) -> Iterator[Lab]:
    """A lab with its export root on a file system of 2 MiB."""
    lab.root.path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(lab.root.path)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield lab
    subprocess.run(["umount", "--lazy", lab.root.path], check=True)


def put(lab: Lab, added: int, hours: int) -> None:
    lab.put([{KEY: f"d{n}", "n": n + added, TIMESTAMP: ago(hours=hours)} for n in range(3000)])


def test_an_export_for_which_there_is_no_room_leaves_nothing(small: Lab) -> None:
    small.define({"n": "int64"})
    put(small, 0, hours=9)
    small.export()
    before = small.files()
    served = small.served()
    ballast = small.root.path / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(small.root.path).free - (40 << 10))
    put(small, 1, hours=8)
    told = r"writing rows to .*/export root .*\(java.io.IOException: No space left on device\)"
    with pytest.raises(SparkFailed, match=told):
        small.export()
    ballast.unlink()
    assert (small.files(), small.served(), small.seqs()) == (before, served, [1])
    small.export()
    assert small.served()[("d7",)]["n"] == 8
