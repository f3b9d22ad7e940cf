"""An exporter is killed at a step of publishing: the entry is complete or absent, and the next exporter cleans up."""

import os
import signal
import time
import uuid
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from shoal.engine.base.failpoints import FAILPOINTS
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.root.manifest import Manifest, PublishedFile
from shoal.loaders.backup.verify import verify_root
from shoal.spark_export.publication.in_directory import DirectoryStaging, directory_staging
from shoal.spark_export.publication.staging import remove_states, state_directories
from tests import stores
from tests.dynamodb import test_sync
from tests.failpoints import test_backup, test_server, test_store, test_stream
from tests.failpoints.processes import running
from tests.loaders import test_dropped_views

VIEW = stores.schema("doc", key="int64", a="int64")
POINTS = (
    "export.parts-moved",
    "export.state-moved",
    "export.manifest-aside",
    "export.log-linked",
    "export.manifest-aside:2",
    "export.published",
)
A_DAY_AND_MORE = 25 * 3600


def publish(root_path: Path, kind: str, value: int) -> None:
    """Publish files as an export publishes the files that Spark has written."""
    root = ExportRoot(root_path)
    states = state_directories(root, VIEW.name)
    published = root.sequence_numbers(VIEW.name)
    previous = root.entry(VIEW.name, published[-1]) if published else None
    if previous is not None:
        root.finish(previous)
    run = uuid.uuid4().hex
    seq = previous.seq + 1 if previous else 1
    with directory_staging(root, VIEW.name, run, seq) as stage:
        files = _written(stage, kind, value)
        stage.publish(
            Manifest(
                kind="snapshot" if kind == "snapshot" else "delta",
                id=run,
                seq=seq,
                parent=previous.id if previous else None,
                view=VIEW,
                rows=2,
                tombstones=0,
                files=files,
                watermark=stores.NOW,
                published_at=datetime.now(UTC),
                job="tests",
                inputs=("tests",),
                state=stage.state,
            )
        )
        remove_states(root, (name for name in states if previous is None or not name.endswith(f"/{previous.state}")))


def _written(stage: DirectoryStaging, kind: str, value: int) -> tuple[PublishedFile, ...]:
    """Write the files of an entry with two rows, and a ledger, as Spark does. Return the entry's files."""
    rows = [{"doc_id": key, "a": value} for key in (1, 2)]
    table = stores.published_table(VIEW, rows, (), delta=kind == "delta")
    for directory in (stage.parts, stage.ledger):
        directory.mkdir()
        pq.write_table(table, directory / "part-00000.parquet")
    return stage.files()


def listed(root: ExportRoot) -> set[Path]:
    """Return all files that a root should have."""
    manifests = [root.entry(VIEW.name, seq) for seq in root.sequence_numbers(VIEW.name)]
    paths = {root.path / VIEW.name / "deltas" / f"{manifest.seq:012d}" / "manifest.json" for manifest in manifests}
    for manifest in manifests:
        paths |= {
            root.directory(manifest) / name for name in ("manifest.json", *(file.path for file in manifest.files))
        }
    # An export keeps the state that it started from, because another export may also be starting from it.
    paths |= {
        path
        for manifest in manifests[-2:]
        for path in (root.path / VIEW.name / "state" / str(manifest.state)).iterdir()
    }
    return paths


def there(root: ExportRoot) -> set[Path]:
    return {path for path in root.path.rglob("*") if path.is_file()}


def grow_old(paths: Iterable[Path]) -> None:
    for path in paths:
        os.utime(path, (time.time() - A_DAY_AND_MORE,) * 2)


@pytest.mark.parametrize(
    ("kind", "point"),
    [("delta", point) for point in POINTS if ":" not in point] + [("snapshot", point) for point in POINTS],
)
def test_an_exporter_that_is_killed_at_a_step(kind: str, point: str, tmp_path: Path) -> None:
    """The export of a snapshot writes two manifests (in the log and under `snapshots`), so it reaches
    `export.manifest-aside` twice; a delta reaches it once."""
    root = ExportRoot(tmp_path / "root")
    log = tmp_path / "log"
    publish(root.path, "snapshot", 1)
    with running(publish, root.path, kind, 2, die_at=point, log=log) as exporter:
        exporter.join(30)
        assert exporter.exitcode == -signal.SIGKILL, log.read_text()
    was_published = point in ("export.log-linked", "export.manifest-aside:2", "export.published")
    assert root.sequence_numbers(VIEW.name) == ([1, 2] if was_published else [1])
    assert [checked for checked in verify_root(root) if checked.problem] == []
    grow_old(root.path.rglob("*"))
    for value in (3, 4):
        publish(root.path, kind, value)
    assert there(root) ^ listed(root) == set()
    assert [path for path in root.path.rglob("*") if path.is_dir() and not any(path.iterdir())] in (
        [],
        [root.path / VIEW.name / "_staging"],
    )
    assert [checked for checked in verify_root(root) if checked.problem] == []
    newest = root.newest_snapshot(VIEW.name)
    assert newest is not None
    assert newest.seq == (root.sequence_numbers(VIEW.name)[-1] if kind == "snapshot" else 1)


def test_what_an_exporter_may_still_be_publishing_stays(tmp_path: Path) -> None:
    root = ExportRoot(tmp_path / "root")
    log = tmp_path / "log"
    publish(root.path, "snapshot", 1)
    with running(publish, root.path, "snapshot", 2, die_at="export.state-moved", log=log) as exporter:
        exporter.join(30)
    (unlisted,) = (path for path in (root.path / VIEW.name / "snapshots").iterdir() if len(list(path.iterdir())) == 1)
    publish(root.path, "snapshot", 3)
    assert unlisted.is_dir()
    grow_old([unlisted, *unlisted.iterdir()])
    publish(root.path, "snapshot", 4)
    assert not unlisted.exists()


def test_there_is_a_case_for_every_failpoint() -> None:
    """A case fails if it does not reach its point. This test fails if a point has no case."""
    points = {point for _, point in test_store.CASES} | {*POINTS}
    points |= {*test_server.OF_THE_SERVER, *test_server.OF_WORKERS, *test_server.OF_THE_WRITER}
    points |= {*test_stream.POINTS, *test_sync.DEATHS, *test_backup.POINTS, *test_dropped_views.POINTS}
    assert {point.partition(":")[0] for point in points} == {*FAILPOINTS}
