"""Real Spark exports and streams to S3, written by Spark's tasks: the entries are the same as in a directory, and each
is published once and completely."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from shoal.engine.base.errors import PublicationLost, ShoalError
from shoal.engine.root.export_root import ExportRoot, entry_directory
from shoal.loaders.backup.verify import verify_root
from shoal.spark_export.report import Report
from shoal.spark_export.source.session import spark_session
from tests.faulty_network import FaultyNetwork
from tests.s3 import server
from tests.spark_export import test_streams
from tests.spark_export.lab import KEY, TIMESTAMP, VIEW, Lab, Row, ago
from tests.spark_export.test_streams import event

ROWS: list[Row] = [{KEY: f"d{i}", "n": i, "e": [i, 0.5], "x": i / 2, TIMESTAMP: ago(hours=9)} for i in range(300)]
FEATURES = {"n": "int64", "e": "float32[2]", "x": "float64"}


@pytest.fixture(scope="module")
def spark(endpoint: str) -> SparkSession:
    """The process's Spark session. Its Python tasks get the S3 access variables, as `spark.executorEnv` would give
    them."""
    session = spark_session("local[2]")
    session.sparkContext.environment.update(server.ACCESS)
    return session


@pytest.fixture
def lab(tmp_path: Path, spark: SparkSession, remote: ExportRoot) -> Lab:
    """A lab whose export root is in S3."""
    lab = Lab(tmp_path, spark)
    lab.root = remote
    lab.define(FEATURES, tolerances={"x": 0.1})
    lab.put(ROWS)
    return lab


def assert_nothing_is_left_over(lab: Lab) -> None:
    """Assert that every object belongs to an entry or to the state of one of the last two entries."""
    manifests = [lab.root.entry(VIEW, seq) for seq in lab.seqs()]
    allowed = {f"{VIEW}/deltas/{manifest.seq:012d}/manifest.json" for manifest in manifests}
    for manifest in manifests:
        names = ["manifest.json", *(file.path for file in manifest.files)]
        allowed |= {f"{entry_directory(manifest)}/{name}" for name in names}
    states = {f"{VIEW}/state/{manifest.state}" for manifest in manifests[-2:]}
    found = {file.name for file in lab.root.storage.files(VIEW)}
    assert {name for name in found if name.rpartition("/")[0] not in states} == allowed
    assert {checked.problem for checked in verify_root(lab.root)} == {None}


def test_snapshots_and_deltas_are_those_of_a_directory(lab: Lab, tmp_path: Path) -> None:
    beside = Lab(tmp_path, lab.spark)
    beside.define(FEATURES, tolerances={"x": 0.1})
    changed = [ROWS[0] | {"n": -1}, ROWS[1] | {"x": 7.0}, ROWS[2] | {"x": 1.05}, *ROWS[3:299]]
    for rows in (ROWS, changed, changed):
        lab.put(rows)
        reports = [one.export() for one in (lab, beside)]
        told = [(report.kind, report.seq, report.changed, report.removed, report.unchanged) for report in reports]
        assert told[0] == told[1]
    assert told[0] == (None, 2, 0, 0, 299)
    assert [lab.published(lab.root.entry(VIEW, seq)) for seq in (1, 2)] == [
        beside.published(beside.root.entry(VIEW, seq)) for seq in (1, 2)
    ]
    assert len(lab.root.entry(VIEW, 1).files) == 3
    assert_nothing_is_left_over(lab)


def test_of_two_exporters_of_one_seq_one_wins(lab: Lab) -> None:
    lab.export()
    lab.put([row | {"n": row["n"] + 1} for row in ROWS])

    def run(_: int) -> Report | ShoalError:
        try:
            return lab.export()
        except PublicationLost as error:
            return error

    with ThreadPoolExecutor(2) as threads:
        outcomes = list(threads.map(run, range(2)))
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["PublicationLost", "Report"]
    assert {row["n"] for row in lab.served().values()} == set(range(1, 301))
    assert_nothing_is_left_over(lab)


def test_a_network_that_fails_delays_an_export_and_no_more(lab: Lab, network: FaultyNetwork) -> None:
    lab.root = ExportRoot(str(lab.root))
    faults = [network.fail(method=method, status=503, times=2) for method in ("PUT", "GET", "HEAD")]
    lost = network.fail(method="PUT", text="deltas/000000000001/manifest.json", lost=True)
    assert lab.export().new == 300
    cut = network.fail(text="/state/", cut=0)
    lab.put([ROWS[0] | {"n": -1}, *ROWS[1:]])
    report = lab.export()
    assert (report.kind, report.changed, report.seq) == ("delta", 1, 2)
    assert [fault.met for fault in (*faults, lost, cut)] == [2, 2, 2, 1, 1]
    assert_nothing_is_left_over(lab)


def test_an_export_that_fails_for_good_leaves_nothing_and_the_next_succeeds(lab: Lab, network: FaultyNetwork) -> None:
    lab.root = ExportRoot(str(lab.root))
    network.fail(method="PUT", text="deltas/", status=403, times=float("inf"))
    with pytest.raises(ShoalError, match="S3 answers 403"):
        lab.export()
    network.mend()
    assert list(lab.root.storage.files(VIEW)) == []
    assert lab.export().seq == 1
    assert_nothing_is_left_over(lab)


def test_a_stream_publishes_and_shortens_its_log_as_in_a_directory(lab: Lab) -> None:
    events = lab.directory / "events"
    events.mkdir()
    test_streams.define(lab)
    for minute in range(1, 5):
        rows = [event("a", minute, minutes=minute), event(f"b{minute}", minute, minutes=9 - minute)]
        test_streams.put(events, *rows)
        assert test_streams.run(lab, snapshot_every=2) == [2]
    kinds = [lab.root.entry(VIEW, seq).kind for seq in lab.seqs()]
    # After the first entry, which is a snapshot, deltas 2 and 3 led to snapshot 4.
    assert (lab.seqs(), kinds) == ([1, 2, 3, 4, 5], ["snapshot", "delta", "delta", "snapshot", "delta"])
    assert test_streams.clicks(lab) == {"a": 4} | {f"b{minute}": minute for minute in range(1, 5)}
    assert_nothing_is_left_over(lab)
    test_streams.put(events, event("c", 9, minutes=1))
    assert test_streams.run(lab, snapshot_every=2) == [1]
    assert (lab.seqs(), lab.newest().kind) == ([4, 5, 6, 7], "snapshot")
    assert len(test_streams.clicks(lab)) == 6
    assert_nothing_is_left_over(lab)


S3A = (
    "org.apache.hadoop:hadoop-aws:3.5.0",
    *(f"software.amazon.awssdk:{part}:2.35.4" for part in ("s3", "s3-transfer-manager", "sts", "apache-client")),
)
"""Hadoop's s3a with only the parts of Amazon's SDK that it needs; the complete SDK has 600 MB."""


def test_spark_that_has_s3a_writes_by_it_and_either_way_continues_the_other(lab: Lab) -> None:
    packages = ["--packages", ",".join(S3A), "--exclude-packages", "software.amazon.awssdk:bundle", "pyspark-shell"]
    environment = os.environ | {"PYSPARK_SUBMIT_ARGS": " ".join(packages)}
    command = [sys.executable, "-m", "shoal", "export", "--views", str(lab.views_path), "--to", str(lab.root), "--json"]
    assert lab.export().new == 300
    lab.put([ROWS[0] | {"n": -1}, *ROWS[1:]])
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (report,) = json.loads(done.stdout)
    assert (report["kind"], report["seq"], report["changed"]) == ("delta", 2, 1)
    state = lab.root.storage.files(f"{VIEW}/state/{lab.newest().state}")
    assert any(file.name.endswith("/_SUCCESS") for file in state), "it was not written by s3a"
    lab.put([ROWS[0] | {"n": -2}, *ROWS[1:]])
    last = lab.export()
    assert (last.kind, last.seq, last.changed) == ("delta", 3, 1)
    assert lab.served()[("d0",)]["n"] == -2
