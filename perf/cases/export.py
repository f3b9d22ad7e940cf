"""Change detection: a full export by Spark, and a delta export after 1% of the source changed.

Both run as the command `shoal export`, so that the start of Python, Java and Spark counts. Spark uses its default
memory settings.
"""

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from perf import commands
from perf.commands import Ran
from perf.dataset import ROW_GROUP, Dataset, distinct_documents, key_column, values
from perf.report import Finding
from perf.scale import Scale
from perf.stores import ROWS_PER_FILE, bring_up_to_date, check
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.root.manifest import TOMBSTONE, Manifest

FEATURES = 50
CHANGED_SHARE = 0.01
MASTER = "local[2]"
EVENT_TIME = 1_760_000_000_000_000
"""The event time of the original rows in microseconds since 1970. Each change of a row is a day later."""
DAY = 86_400_000_000


@dataclass(frozen=True)
class Exported:
    """A run of `shoal export`, and the manifest that it published."""

    ran: Ran
    manifest: Manifest

    @property
    def bytes(self) -> int:
        """The size of the published Parquet files in bytes."""
        return sum(file.bytes for file in self.manifest.files)


def run(scale: Scale) -> list[Finding]:
    """Measure a full export and a delta export; load both into a store to check them."""
    data = Dataset(scale.load_rows, FEATURES)
    changed = distinct_documents(data, int(data.rows * CHANGED_SHARE), seed=7)
    change_of = np.zeros(data.rows, np.int64)
    with tempfile.TemporaryDirectory(prefix="export-", dir=scale.directory) as temporary:
        workspace = Path(temporary)
        root = ExportRoot(workspace / "root")
        _write_source(workspace / "source", data, change_of)
        full = _export(workspace, root, data)
        change_of[changed] = 1
        _write_source(workspace / "source", data, change_of)
        delta = _export(workspace, root, data)
        shutil.rmtree(workspace / "source")
        wrong = _wrong_rows(root, delta.manifest, data, changed)
        bring_up_to_date(workspace / "store", root)
        check(workspace / "store", data, changed, change=1)
        check(workspace / "store", data, np.flatnonzero(change_of == 0))
    case = f"export of {data.rows:,} x {FEATURES}, then of {changed.size:,} changed rows"
    peak = max(full.ran.peak_private, delta.ran.peak_private)
    return [
        Finding(case, "full export", full.ran.seconds, "s", detail=_report(full)),
        Finding(case, "delta", delta.ran.seconds, "s", detail=_report(delta)),
        Finding(case, "delta / full, seconds", delta.ran.seconds / full.ran.seconds, "x", at_most=1.0),
        Finding(case, "delta / full, bytes", delta.bytes / full.bytes, "x", at_most=0.02),
        Finding(case, "rows shipped", delta.manifest.rows, "rows"),
        Finding(case, "rows missing, shipped needlessly, or wrong", wrong, "rows", at_most=0),
        Finding(case, "most memory of Python and Spark", peak / 1e6, "MB"),
    ]


def _export(workspace: Path, root: ExportRoot, data: Dataset) -> Exported:
    schema = data.schema.model_dump(mode="json", include={"name", "join_keys", "features"})
    view = schema | {"timestamp_field": "event_timestamp", "source": {"path": str(workspace / "source")}}
    views = workspace / "views.yaml"
    views.write_text(yaml.safe_dump({"views": [view]}))
    # Spark's spill files are removed with the workspace, however Spark ends.
    ran = commands.run(
        *("export", "--views", views, "--to", root.path, "--master", MASTER, "--json"),
        environment={"SPARK_LOCAL_DIRS": str(workspace / "spark")},
    )
    return Exported(ran, root.entry(data.view, root.sequence_numbers(data.view)[-1]))


def _report(exported: Exported) -> dict[str, object]:
    """Return the exporter's report of a run."""
    report: dict[str, object] = json.loads(exported.ran.output)[0]
    return report


def _write_source(directory: Path, data: Dataset, change_of: npt.NDArray[np.int64]) -> None:
    """Write the source as a batch job would: all rows as Parquet, each with the values of its last change."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    files = max(2, data.rows // ROWS_PER_FILE)
    for number, documents in enumerate(np.array_split(np.arange(data.rows, dtype=np.int64), files)):
        writer = None
        for start in range(0, documents.size, ROW_GROUP):
            part = documents[start : start + ROW_GROUP]
            change = change_of[part]
            columns = {
                "doc_id": key_column(part),
                "event_timestamp": pa.array(EVENT_TIME + DAY * change).cast(pa.timestamp("us", tz="UTC")),
                **{f"f{feature}": pa.array(values(part, feature, change)) for feature in range(data.features)},
            }
            table = pa.table(columns)
            writer = writer or pq.ParquetWriter(directory / f"part-{number:05d}.parquet", table.schema)
            writer.write_table(table)
        if writer is not None:
            writer.close()


def _wrong_rows(root: ExportRoot, manifest: Manifest, data: Dataset, changed: npt.NDArray[np.int64]) -> int:
    """Return the number of wrong rows in a delta. The delta must contain each changed row once, with its new values,
    and no other rows."""
    files = [root.directory(manifest) / file.path for file in manifest.files]
    table = pa.concat_tables([pq.read_table(file) for file in files])
    keys = pc.utf8_slice_codeunits(table["doc_id"], len("doc_"))
    documents = keys.cast(pa.int64()).to_numpy()
    wrong = np.setxor1d(documents, changed).size + documents.size - np.unique(documents).size
    right = ~table[TOMBSTONE].to_numpy()
    for feature in range(data.features):
        right &= table[f"f{feature}"].to_numpy() == values(documents, feature, change=1)
    return int(wrong + np.count_nonzero(~right))
