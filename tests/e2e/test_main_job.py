"""The main job as a user does it: only commands, real Spark, a real server, and a delta while it serves."""

import io
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

VIEWS = """
views:
  - name: docs
    join_keys: [{name: doc_id, type: string}]
    features:
      - {name: clicks, type: int64}
      - {name: ctr, type: float32, tolerance: 0.01}
      - {name: embedding, type: "float32[4]"}
    timestamp_field: at
    source: {path: source}
    shards: 3
services:
  - {name: ranker, features: ["docs:ctr", "docs:embedding"]}
"""
ROWS = 1000


def documents(changed: range, removed: range) -> dict[str, dict[str, Any]]:
    """Return the rows of the source by key, after some documents changed and some were removed."""
    rows = {}
    for number in range(ROWS):
        if number not in removed:
            change = 1 if number in changed else 0
            rows[f"doc {number}"] = {
                "clicks": number + 1_000_000 * change,
                "ctr": float(np.float32(number / ROWS + change)),
                "embedding": [float(number), 0.5, float(change), -1.0],
            }
    return rows


def write_source(directory: Path, rows: dict[str, dict[str, Any]]) -> None:
    """Replace the source's files."""
    directory.mkdir(exist_ok=True)
    at = datetime.now(UTC)
    table = pa.table(
        {
            "doc_id": list(rows),
            "at": pa.array([at] * len(rows), pa.timestamp("us", tz="UTC")),
            "clicks": pa.array([row["clicks"] for row in rows.values()], pa.int64()),
            "ctr": pa.array([row["ctr"] for row in rows.values()], pa.float32()),
            "embedding": pa.array([row["embedding"] for row in rows.values()], pa.list_(pa.float32())),
        }
    )
    pq.write_table(table, directory / "part.parquet")


def shoal(directory: Path, *arguments: str) -> str:
    """Run a command, and return its output."""
    command = [sys.executable, "-m", "shoal", *arguments]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=directory, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def served(directory: Path) -> Iterator[str]:
    """Run `shoal serve` with two workers on a free port, and yield its URL."""
    command = [
        sys.executable,
        "-m",
        "shoal",
        "serve",
        "--store",
        "store",
        "--from",
        "root",
        "--workers",
        "2",
        "--port",
        "0",
    ]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=directory, env=environment)
    assert process.stderr is not None
    try:
        url = next(line for line in process.stderr if "listening on" in line).rsplit(maxsplit=1)[1]
        yield url
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()


def ask(url: str, body: dict[str, Any], accept: str = "application/json") -> tuple[bytes, int]:
    """Look up, and return the body of the answer and its version."""
    request = urllib.request.Request(f"{url}/v1/lookup", json.dumps(body).encode(), {"Accept": accept})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read(), int(answer.headers["X-Shoal-Version"])


def wait_for_seq(url: str, seq: int) -> None:
    """Wait until the server has applied an entry of the log."""
    while True:
        try:
            with urllib.request.urlopen(f"{url}/v1/status", timeout=30) as answer:
                views = json.loads(answer.read())["views"]
        except urllib.error.URLError:
            views = []
        if any(view.get("applied_seq") == seq for view in views):
            return
        time.sleep(0.1)


def check(url: str, rows: dict[str, dict[str, Any]]) -> int:
    """Compare the answers in every format with the source's rows, and return the version."""
    keys = [f"doc {number}" for number in range(ROWS + 5)]
    body = {"features": ["docs:*"], "entities": {"doc_id": keys}}
    content, version = ask(url, body)
    answer = json.loads(content)
    assert answer["features"]["docs:clicks"] == [rows.get(key, {}).get("clicks") for key in keys]
    assert answer["features"]["docs:embedding"] == [rows.get(key, {}).get("embedding") for key in keys]
    assert answer["status"]["docs"] == ["PRESENT" if key in rows else "NOT_FOUND" for key in keys]
    content, _ = ask(url, body, "application/vnd.apache.arrow.stream")
    table = pa.ipc.open_stream(content).read_all()
    assert table["docs:ctr"].to_pylist() == [rows.get(key, {}).get("ctr") for key in keys]
    content, _ = ask(url, {"service": "ranker", "entities": {"doc_id": keys}}, "application/x-npy")
    absent = {"ctr": np.nan, "embedding": [np.nan] * 4}
    expected = [[row["ctr"], *row["embedding"]] for row in (rows.get(key, absent) for key in keys)]
    np.testing.assert_array_equal(np.load(io.BytesIO(content)), np.array(expected, np.float32))
    return version


def test_from_spark_to_answers_with_a_delta_while_serving(tmp_path: Path) -> None:
    (tmp_path / "views.yaml").write_text(VIEWS)
    before = documents(range(0), range(0))
    write_source(tmp_path / "source", before)
    first = json.loads(shoal(tmp_path, "export", "--views", "views.yaml", "--to", "root", "--json"))
    assert [(report["kind"], report["seq"], report["new"]) for report in first] == [("snapshot", 1, ROWS)]
    with served(tmp_path) as url:
        wait_for_seq(url, 1)
        version = check(url, before)
        after = documents(range(100, 150), range(990, 1000))
        write_source(tmp_path / "source", after)
        second = json.loads(shoal(tmp_path, "export", "--views", "views.yaml", "--to", "root", "--json"))
        counts = [(report["kind"], report["seq"], report["changed"], report["removed"]) for report in second]
        assert counts == [("delta", 2, 50, 10)]
        wait_for_seq(url, 2)
        assert check(url, after) > version
        lookup = ["lookup", "--store", "store", "--features", "docs:clicks", "--key", "doc_id=doc 100"]
        (history,) = json.loads(shoal(tmp_path, *lookup, "--explain", "--json"))["history"]["docs"]
        assert [(row["origin"]["kind"], row["values"]["clicks"]) for row in history] == [
            ("delta", 1_000_100),
            ("snapshot", 100),
        ]
    assert "0 bad" in shoal(tmp_path, "verify", "store")
    assert "0 bad" in shoal(tmp_path, "verify", "root")
