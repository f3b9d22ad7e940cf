"""Data for benchmarks. A formula gives every value, feature j of document i, without a store.

So answers are checked against arithmetic, not against the code that produced them. With a hundred million rows, only
the hashes of all rows are in memory at the same time. They take some gigabytes.
"""

import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shoal.engine.format.keys import KEY_HASH, KEY_HASH_2
from shoal.engine.format.schema import ViewSchema
from shoal.engine.kernels.hashing import key_hashes
from shoal.engine.root.export_root import ExportRoot, file_checksum
from shoal.engine.root.manifest import EVENT_TIMESTAMP, TOMBSTONE, Manifest, PublishedFile

KEY_BLOCK = 1 << 20
ROW_GROUP = 1 << 17
_BY_DOCUMENT, _BY_FEATURE, _BY_CHANGE = 1_000_003, 7_919, 104_729
_PRIME, _SCALE = 16_777_213, 16_777_216
"""The greatest prime below 2^24, and 2^24 itself. A float32 can represent all integers up to 2^24."""


@dataclass(frozen=True)
class Dataset:
    """`rows` documents with `features` float32 features each.

    The last join key identifies a document (`doc_<i>` for doc_id). Earlier join keys have the same value in all rows
    (`user_7`).
    """

    rows: int
    features: int
    view: str = "docs"
    join_keys: tuple[str, ...] = ("doc_id",)

    @property
    def schema(self) -> ViewSchema:
        """The schema of the view."""
        return ViewSchema.model_validate(
            {
                "name": self.view,
                "join_keys": [{"name": name, "type": "string"} for name in self.join_keys],
                "features": [{"name": f"f{number}", "type": "float32"} for number in range(self.features)],
            }
        )

    @property
    def references(self) -> list[str]:
        """The references of all features, as in a request."""
        return [f"{self.view}:f{number}" for number in range(self.features)]


THE_USER = "user_7"


def key_column(documents: npt.NDArray[np.int64], kind: str = "doc") -> pa.Array:
    """Return keys as an Arrow array: the keys of documents (`doc_<i>`), or keys of another kind. The function creates
    no Python object per key."""
    return pc.binary_join_element_wise(kind, pa.array(documents).cast(pa.string()), "_")


def _key_columns(data: Dataset, documents: npt.NDArray[np.int64]) -> dict[str, pa.Array]:
    own = data.join_keys[-1]
    columns = {name: pa.repeat(THE_USER, documents.size) for name in data.join_keys[:-1]}
    return columns | {own: key_column(documents, own.removesuffix("_id"))}


def document_keys(documents: npt.NDArray[np.int64]) -> list[str]:
    """Return the keys of documents, as in a request."""
    return [f"doc_{document}" for document in documents.tolist()]


def values(
    documents: npt.NDArray[np.int64], feature: int, change: int | npt.NDArray[np.int64] = 0
) -> npt.NDArray[np.float32]:
    """Return float32[documents]: the values of feature number `feature` after the `change`-th change of each document.
    `change` is one number for all documents, or one number per document."""
    mixed = (documents * _BY_DOCUMENT + feature * _BY_FEATURE + change * _BY_CHANGE) % _PRIME
    return (mixed / _SCALE).astype(np.float32)


def matrix(
    documents: npt.NDArray[np.int64], features: int, change: int | npt.NDArray[np.int64] = 0
) -> npt.NDArray[np.float32]:
    """Return float32[documents, features]: all features of documents."""
    return np.stack([values(documents, feature, change) for feature in range(features)], axis=1)


def changes_seen(documents: npt.NDArray[np.int64], first: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Return int64[documents]: the number of the last change of each document, computed from the values of its
    feature 0 in `first`."""
    mixed = np.rint(np.nan_to_num(first).astype(np.float64) * _SCALE).astype(np.int64)
    return (mixed - documents * _BY_DOCUMENT) % _PRIME * pow(_BY_CHANGE, -1, _PRIME) % _PRIME


def publish_snapshot(root: ExportRoot, data: Dataset, *, files: int) -> Manifest:
    """Publish all documents as a snapshot."""
    manifest = _write(root, data, np.arange(data.rows, dtype=np.int64), "snapshot", 0, files)
    root.publish(manifest)
    return manifest


def publish_delta(root: ExportRoot, data: Dataset, documents: npt.NDArray[np.int64], change: int) -> Manifest:
    """Publish the `change`-th change of some documents as a delta."""
    manifest = write_delta(root, data, documents, change)
    root.publish(manifest)
    return manifest


def publish_state(
    root: ExportRoot,
    data: Dataset,
    changes: npt.NDArray[np.int64],
    event_times: npt.NDArray[np.int64],
    documents: npt.NDArray[np.int64] | None = None,
) -> Manifest:
    """Publish a delta with the given documents, or a snapshot with all documents if `documents` is None.

    `changes` has the number of the last change of each document of the data set. `event_times` has the event time of
    each of these changes, in microseconds since 1970.
    """
    chosen = np.arange(data.rows, dtype=np.int64) if documents is None else documents
    kind = "snapshot" if documents is None else "delta"
    manifest = _write(root, data, chosen, kind, changes[chosen], 2 if documents is None else 1, event_times[chosen])
    root.publish(manifest)
    return manifest


def write_delta(root: ExportRoot, data: Dataset, documents: npt.NDArray[np.int64], change: int) -> Manifest:
    """Write the files of a delta, and return its manifest. The delta does not exist until the caller publishes the
    manifest."""
    return _write(root, data, documents, "delta", change, max(1, documents.size // 1_000_000))


def write_again(root: ExportRoot, view: str) -> Manifest:
    """Write a view's first snapshot again, with hard links to its files, as the next entry of the log. Like
    `write_delta`, return the manifest, but do not publish it."""
    first, last = (root.entry(view, seq) for seq in (1, root.sequence_numbers(view)[-1]))
    again = {"id": uuid.uuid4().hex, "seq": last.seq + 1, "parent": last.id, "published_at": datetime.now(UTC)}
    manifest = first.model_copy(update=again)
    directory = root.directory(manifest)
    directory.mkdir(parents=True)
    for file in first.files:
        os.link(root.directory(first) / file.path, directory / file.path)
    return manifest


def _write(
    root: ExportRoot,
    data: Dataset,
    documents: npt.NDArray[np.int64],
    kind: str,
    change: int | npt.NDArray[np.int64],
    files: int,
    event_times: npt.NDArray[np.int64] | None = None,
) -> Manifest:
    published = root.sequence_numbers(data.view)
    parent = root.entry(data.view, published[-1]) if published else None
    now = datetime.now(UTC)
    draft = Manifest(
        kind="delta" if kind == "delta" else "snapshot",
        id=uuid.uuid4().hex,
        seq=parent.seq + 1 if parent else 1,
        parent=parent.id if parent else None,
        view=data.schema,
        rows=0,
        tombstones=0,
        files=(),
        watermark=now,
        published_at=now,
        job="perf",
        inputs=("perf.dataset",),
    )
    directory = root.directory(draft)
    directory.mkdir(parents=True, exist_ok=True)
    changes = np.broadcast_to(np.int64(change), documents.shape)
    if event_times is None:
        event_times = np.full(documents.size, int(now.timestamp() * 1e6))
    first, second = _hashes(data, documents)
    order = np.lexsort((second, first))
    written = []
    for number, part in enumerate(np.array_split(order, files)):
        path = directory / f"part-{number:05d}.parquet"
        rows = _Rows(documents[part], first[part], second[part], changes[part], event_times[part])
        _write_file(path, data, rows, delta=kind == "delta")
        written.append(
            PublishedFile(
                path=path.name,
                rows=part.size,
                bytes=os.path.getsize(path),
                checksum=file_checksum(path),
                min_key_hash=int(first[part[0]]),
                max_key_hash=int(first[part[-1]]),
            )
        )
    content = draft.model_dump() | {"rows": documents.size, "files": written, "published_at": datetime.now(UTC)}
    return Manifest.model_validate(content)


def _hashes(data: Dataset, documents: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    first = np.empty_like(documents)
    second = np.empty_like(documents)
    for start in range(0, documents.size, KEY_BLOCK):
        block = slice(start, start + KEY_BLOCK)
        first[block], second[block] = key_hashes(list(_key_columns(data, documents[block]).values()))
    return first, second


class _Rows(NamedTuple):
    """Rows to write, as five arrays of int64[rows]: documents, the two hashes of their keys, the numbers of their last
    changes, and their event times."""

    documents: npt.NDArray[np.int64]
    first: npt.NDArray[np.int64]
    second: npt.NDArray[np.int64]
    changes: npt.NDArray[np.int64]
    event_times: npt.NDArray[np.int64]


def _write_file(path: Path, data: Dataset, rows: _Rows, *, delta: bool) -> None:
    writer = None
    for start in range(0, rows.documents.size, ROW_GROUP):
        part = _Rows(*(column[start : start + ROW_GROUP] for column in rows))
        columns = {
            KEY_HASH: pa.array(part.first),
            KEY_HASH_2: pa.array(part.second),
            EVENT_TIMESTAMP: pa.array(part.event_times).cast(pa.timestamp("us", tz="UTC")),
        }
        if delta:
            columns[TOMBSTONE] = pa.array(np.zeros(part.documents.size, np.bool_))
        columns |= _key_columns(data, part.documents)
        for number in range(data.features):
            columns[f"f{number}"] = pa.array(values(part.documents, number, part.changes))
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(path, table.schema, compression="lz4", use_dictionary=False)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def random_documents(data: Dataset, keys: int, count: int, seed: int = 1) -> list[npt.NDArray[np.int64]]:
    """Return the documents of `count` requests, with `keys` uniformly random documents each."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, data.rows, keys) for _ in range(count)]


def distinct_documents(data: Dataset, count: int, seed: int) -> npt.NDArray[np.int64]:
    """Return int64[count]: uniformly random documents without repetition."""
    return np.random.default_rng(seed).choice(data.rows, count, replace=False).astype(np.int64)


def key_lists(requests: Sequence[npt.NDArray[np.int64]]) -> list[list[str]]:
    """Return the keys of each request."""
    return [document_keys(documents) for documents in requests]
