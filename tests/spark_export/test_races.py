"""Several exporters on one export root, and the leftovers of exporters that died."""

import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shoal.engine.base.errors import PublicationLost, RootNotWritable, ShoalError
from shoal.engine.root.manifest import Manifest
from shoal.spark_export.report import Report
from tests.spark_export.lab import KEY, TIMESTAMP, VIEW, Lab, Row, ago

ROWS: list[Row] = [{KEY: f"d{i}", "n": i, TIMESTAMP: ago(hours=9)} for i in range(30)]
CHANGED = [row | {"n": row["n"] + 1} for row in ROWS]


@pytest.mark.parametrize("full", [False, True])
def test_of_two_exporters_of_one_seq_one_wins(lab: Lab, full: bool) -> None:
    lab.define({"n": "int64"})
    lab.put(ROWS)
    lab.export()
    lab.put(CHANGED)
    # An exporter chooses its seq at the start, and publishes it only after several Spark jobs.
    start = threading.Barrier(2)

    def run() -> Report | BaseException:
        start.wait()
        try:
            return lab.export(full=full)
        except PublicationLost as error:
            return error

    with ThreadPoolExecutor(2) as threads:
        outcomes = [future.result() for future in [threads.submit(run), threads.submit(run)]]
    (winner,) = [outcome for outcome in outcomes if isinstance(outcome, Report)]
    (loser,) = [outcome for outcome in outcomes if isinstance(outcome, PublicationLost)]
    assert "seq 2 was published meanwhile" in str(loser)
    assert (winner.seq, lab.seqs()) == (2, [1, 2])
    assert {row["n"] for row in lab.served().values()} == set(range(1, 31))
    _assert_nothing_is_left_over(lab)
    lab.put(CHANGED[1:])
    assert lab.export().removed == 1


def _assert_nothing_is_left_over(lab: Lab) -> None:
    """Assert that every file belongs to an entry or to the state of one of the last two entries."""
    allowed: set[Path] = set()
    manifests = [lab.root.entry(VIEW, seq) for seq in lab.seqs()]
    for manifest in manifests:
        allowed.add(lab.root.path / VIEW / "deltas" / f"{manifest.seq:012d}" / "manifest.json")
        allowed |= {lab.root.directory(manifest) / name for name in ("manifest.json", *_names(manifest))}
    states = {lab.root.path / VIEW / "state" / str(manifest.state) for manifest in manifests[-2:]}
    found = {path for path in lab.root.path.rglob("*") if path.is_file()} - {lab.root.path / "services.json"}
    assert {path for path in found if path.parent not in states} <= allowed
    assert set((lab.root.path / VIEW / "state").iterdir()) == states
    assert list((lab.root.path / VIEW / "_staging").iterdir()) == []


def _names(manifest: Manifest) -> list[str]:
    return [file.path for file in manifest.files]


def test_an_exporter_that_cannot_publish_takes_its_files_away(lab: Lab) -> None:
    lab.define({"n": "int64"})
    lab.put(ROWS)
    lab.export()
    lab.put(CHANGED)
    in_the_way = lab.root.path / VIEW / "deltas" / f"{2:012d}"
    in_the_way.write_text("not a directory")
    before = lab.files()
    for full in (False, True):
        with pytest.raises(ShoalError, match="000000000002"):
            lab.export(full=full)
        assert lab.files() == before
    in_the_way.unlink()
    assert lab.export().changed == 30
    _assert_nothing_is_left_over(lab)


def test_what_a_dead_exporter_left_is_cleared_away_when_it_is_old(lab: Lab) -> None:
    lab.define({"n": "int64"})
    lab.put(ROWS)
    lab.export()
    staging = lab.root.path / VIEW / "_staging"
    for name, age in (("dead", 25 * 3600), ("alive", 3600)):
        (staging / name / "parts").mkdir(parents=True)
        (staging / name / "parts" / "part-00000.parquet").write_bytes(b"unfinished")
        for path in (staging / name / "parts" / "part-00000.parquet", staging / name / "parts", staging / name):
            os.utime(path, (time.time() - age,) * 2)
    # This exporter died after it moved its parts into the log, and before it published them.
    stray = lab.root.path / VIEW / "deltas" / f"{2:012d}" / "part-deadbeef-00000.parquet"
    stray.parent.mkdir()
    stray.write_bytes(b"unpublished")
    lab.put(CHANGED)
    assert lab.export().changed == 30
    assert [path.name for path in staging.iterdir()] == ["alive"]
    assert not stray.exists()


def test_a_root_that_cannot_be_written_is_named(lab: Lab) -> None:
    lab.define({"n": "int64"})
    lab.put(ROWS)
    lab.root.path.write_text("a file")
    with pytest.raises(RootNotWritable, match=f"export root {re.escape(str(lab.root))} cannot be written"):
        lab.export()
