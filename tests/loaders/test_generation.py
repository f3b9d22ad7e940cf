"""Building a generation: each chunk is on disk before the next one, so an interrupted build can continue."""

import os
import threading
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engine.base.errors import FileDamaged
from shoal.engine.format.catalog import SegmentRecord, chunk_key
from shoal.engine.format.layout import RowLayout
from shoal.engine.format.paths import DATA, generation_path, generations_path
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.root.manifest import Manifest, PublishedFile
from shoal.engine.store.open_version import read_generation
from shoal.engine.store.segment import Segment
from shoal.loaders.segments import generation
from shoal.loaders.segments.arrow_rows import encode
from shoal.loaders.segments.generation import (
    GenerationBuilder,
    build_from_entry,
    chunk_plans,
    clear_dead_folds,
    clear_unfinished,
)
from shoal.loaders.segments.published_rows import EntryReader, RowGroup
from shoal.loaders.segments.segment_writer import ChunkBuilder
from tests import stores
from tests.engine.segments import Identity, batch, record
from tests.loaders.forgery import publish, snapshot_table

VIEW = stores.schema("doc", key="int64", a="int64", text="string")
ROWS: list[stores.Row] = [{"doc_id": n, "a": n, "text": "x" * (n % 50)} for n in range(2000)]
FILE = PublishedFile(path="a", rows=1, bytes=1, checksum="0" * 16, min_key_hash=0, max_key_hash=0)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return publish(ExportRoot(tmp_path / "root"), VIEW, snapshot_table(VIEW, ROWS), row_group_size=100)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "CHUNK_BYTES", 16 << 10)


class Counter:
    """A progress callback that counts the reported rows, and raises KeyboardInterrupt after a given number of calls."""

    def __init__(self, breaks_off_after: int | None = None) -> None:
        self.rows: list[int] = []
        self._left = breaks_off_after

    def __call__(self, rows: int) -> None:
        self.rows.append(rows)
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                raise KeyboardInterrupt


def build(tmp_path: Path, manifest: Manifest, progress: Counter) -> GenerationBuilder:
    builder = GenerationBuilder(tmp_path / "store", "doc", "1-abc")
    build_from_entry(builder, EntryReader(ExportRoot(tmp_path / "root"), manifest), progress)
    return builder


def as_segment(tmp_path: Path, builder: GenerationBuilder) -> Segment:
    chunks = builder.chunks
    content: dict[str, Any] = {
        "id": builder.id,
        "chunks": len(chunks),
        "offsets": tuple(chunk.offset for chunk in chunks),
        "rows": sum(chunk.rows for chunk in chunks),
        "bytes": sum(chunk.size for chunk in chunks),
    }
    described: SegmentRecord = record(VIEW, [], [], 1).model_copy(update=content)
    return read_generation(tmp_path / "store", described)


def test_a_completed_build_has_its_name_and_all_rows(tmp_path: Path, manifest: Manifest, small_chunks: None) -> None:
    builder = build(tmp_path, manifest, Counter())
    assert not builder.path.exists()
    builder.complete()
    assert [path.name for path in generations_path(tmp_path / "store", "doc").iterdir()] == ["1-abc"]
    segment = as_segment(tmp_path, builder)
    assert len(segment.chunks) > 5
    for chunk in segment.chunks:
        chunk.verify()
    assert sum(chunk.header.rows for chunk in segment.chunks) == len(ROWS)
    assert (np.diff(np.concatenate([chunk.hashes for chunk in segment.chunks])) > 0).all()


@pytest.mark.parametrize("calls", [0, 1, 2, 7, 19])
def test_a_build_that_broke_off_goes_on_with_the_chunk_it_was_at(
    tmp_path: Path, manifest: Manifest, small_chunks: None, calls: int
) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, manifest, Counter(calls))
    on_disk = GenerationBuilder(tmp_path / "store", "doc", "1-abc")
    done = sum(chunk.rows for chunk in on_disk.chunks)
    second = Counter()
    builder = build(tmp_path, manifest, second)
    builder.complete()
    assert second.rows[0] == done
    assert done >= 100 * (calls - 4)
    assert sum(second.rows) == len(ROWS)
    segment = as_segment(tmp_path, builder)
    once = np.concatenate([chunk.hashes for chunk in segment.chunks])
    assert len(set(once.tolist())) == len(ROWS)


def test_a_build_that_broke_off_leaves_nothing_running(tmp_path: Path, manifest: Manifest, small_chunks: None) -> None:
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt) as broken:
        build(tmp_path, manifest, Counter(5))
    assert threading.active_count() == before
    # The traceback keeps every object of the build alive.
    assert broken.traceback


@pytest.mark.parametrize("torn", ["cut", "cut in its head", "zeros", "behind"])
def test_a_chunk_that_is_there_in_part_is_written_again(
    tmp_path: Path, manifest: Manifest, small_chunks: None, torn: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, manifest, Counter(12))
    before = GenerationBuilder(tmp_path / "store", "doc", "1-abc").chunks
    last = before[-1]
    with (generations_path(tmp_path / "store", "doc") / ".building-1-abc" / DATA).open("r+b") as file:
        if torn == "behind":
            file.seek(0, os.SEEK_END)
            file.write(bytes(4096) + b"x" * 100_000)
        elif torn == "zeros":
            file.seek(last.offset + last.size // 2)
            file.write(bytes(4096))
        else:
            file.truncate(last.offset + (100 if torn == "cut in its head" else last.size - 1))
    after = GenerationBuilder(tmp_path / "store", "doc", "1-abc").chunks
    assert after == (before if torn == "behind" else before[:-1])
    builder = build(tmp_path, manifest, Counter())
    builder.complete()
    segment = as_segment(tmp_path, builder)
    for chunk in segment.chunks:
        chunk.verify()
    assert len({int(first) for chunk in segment.chunks for first in chunk.hashes}) == len(ROWS)


@settings(max_examples=100)
@given(st.data())
def test_whatever_a_power_failure_leaves_of_the_last_write_the_chunks_before_stand(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    store = tmp_path_factory.mktemp("store")
    builder = GenerationBuilder(store, "doc", "1-abc")
    path = generations_path(store, "doc") / ".building-1-abc" / DATA
    states = [path.read_bytes()]
    for number in range(3):
        builder.add(_chunk({(100 * number + n, 1): {"doc_id": n, "text": "x" * 99} for n in range(50)}))
        states.append(path.read_bytes())
    chunks = builder.chunks
    builder.complete()
    states.append((builder.path / DATA).read_bytes())
    os.rename(builder.path, path.parent)

    step = data.draw(st.integers(0, 3), label="writes that reached the disk")
    before = states[step].ljust(len(states[step + 1]), b"\0")
    after = states[step + 1]
    pages = range(0, len(after), 4096)
    reached = data.draw(
        st.lists(st.booleans(), min_size=len(pages), max_size=len(pages)), label="pages of the next one"
    )
    left = b"".join((after if new else before)[at : at + 4096] for at, new in zip(pages, reached, strict=True))
    length = data.draw(st.sampled_from([len(states[step]), len(after)]), label="length")
    path.write_bytes(left[:length])

    found = GenerationBuilder(store, "doc", "1-abc")
    whole = step < 3 and left[:length] == after
    assert found.chunks == chunks[: step + whole]
    for number in range(len(found.chunks), 3):
        found.add(_chunk({(100 * number + n, 1): {"doc_id": n, "text": "x" * 99} for n in range(50)}))
    found.complete()
    assert (found.path / DATA).read_bytes() == states[-1]


def test_a_generation_is_an_environment(tmp_path: Path, manifest: Manifest, small_chunks: None) -> None:
    builder = build(tmp_path, manifest, Counter())
    builder.complete()
    chunks = as_segment(tmp_path, builder).chunks
    with lmdb.open(str(builder.path), readonly=True, lock=False) as env, env.begin() as transaction:
        found = list(transaction.cursor())
    assert [key for key, _ in found] == [chunk_key("1-abc", number) for number in range(len(chunks))]
    assert [value for _, value in found] == [chunk.bytes[: chunk.header.total].tobytes() for chunk in chunks]


def test_a_build_goes_on_with_chunks_of_another_size(
    tmp_path: Path, manifest: Manifest, small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, manifest, Counter(9))
    monkeypatch.setattr(generation, "CHUNK_BYTES", 64 << 10)
    builder = build(tmp_path, manifest, Counter())
    builder.complete()
    segment = as_segment(tmp_path, builder)
    assert len({int(first) for chunk in segment.chunks for first in chunk.hashes}) == len(ROWS)


def test_a_build_that_is_whole_but_has_no_name_is_only_named(tmp_path: Path, manifest: Manifest) -> None:
    build(tmp_path, manifest, Counter())
    again = Counter()
    build(tmp_path, manifest, again).complete()
    assert again.rows == [len(ROWS)]


def test_a_generation_that_was_named_but_never_referred_to_is_taken_up(tmp_path: Path, manifest: Manifest) -> None:
    build(tmp_path, manifest, Counter()).complete()
    again = Counter()
    builder = build(tmp_path, manifest, again)
    assert again.rows == [len(ROWS)]
    assert not builder.path.exists()
    builder.complete()
    assert sum(chunk.header.rows for chunk in as_segment(tmp_path, builder).chunks) == len(ROWS)


def test_a_discarded_build_leaves_nothing(tmp_path: Path, manifest: Manifest) -> None:
    build(tmp_path, manifest, Counter()).discard()
    assert list(generations_path(tmp_path / "store", "doc").iterdir()) == []
    completed = build(tmp_path, manifest, Counter())
    completed.complete()
    completed.discard()
    assert completed.path.exists()


def test_two_chunks_never_share_a_hash(tmp_path: Path) -> None:
    builder = GenerationBuilder(tmp_path, "doc", "1-abc")
    for first in (1, 2):
        builder.add(_chunk({(first, 1): {"doc_id": 1}}))
    with pytest.raises(FileDamaged, match="two chunks share a first hash"):
        builder.add(_chunk({(2, 2): {"doc_id": 1}}))
    with pytest.raises(FileDamaged):
        builder.add(_chunk({(1, 5): {"doc_id": 1}}))
    assert len(builder.chunks) == 2


def test_only_dead_builds_are_cleared(tmp_path: Path) -> None:
    names = ["1-old", "2-new", "1-fold-a", "3-named"]
    for name in names:
        builder = GenerationBuilder(tmp_path, "doc", name)
        if name == "3-named":
            builder.complete()
    clear_unfinished(tmp_path, "doc", but="2-new")
    assert _entries(tmp_path) == {".building-1-fold-a", ".building-2-new", "3-named"}
    clear_dead_folds(tmp_path, "doc")
    assert _entries(tmp_path) == {".building-2-new", "3-named"}
    clear_unfinished(tmp_path, "nowhere", but="2-new")
    clear_dead_folds(tmp_path, "nowhere")


@given(st.lists(st.tuples(st.integers(1, 10**7), st.integers(1, 10**9)), max_size=30), st.integers(1, 10**5))
def test_row_groups_are_gathered_into_chunks_in_order(sizes: list[tuple[int, int]], row_bytes: int) -> None:
    groups = [RowGroup(FILE, number, rows, rows, size) for number, (rows, size) in enumerate(sizes)]
    plans = chunk_plans(groups, row_bytes)
    assert [group for plan in plans for group in plan] == groups
    for number, plan in enumerate(plans):
        size = [max(group.bytes, row_bytes * group.rows) for group in plan]
        assert sum(size[:-1]) < generation.CHUNK_BYTES
        assert sum(size) >= generation.CHUNK_BYTES or number == len(plans) - 1


def test_a_generation_without_rows_has_no_chunks(tmp_path: Path) -> None:
    empty = stores.publish_snapshot(ExportRoot(tmp_path / "root"), VIEW, [])
    builder = build(tmp_path, empty, Counter())
    builder.complete()
    assert builder.chunks == []
    assert list(as_segment(tmp_path, builder).chunks) == []
    assert generation_path(tmp_path / "store", "doc", "1-abc").is_dir()


def _chunk(rows: dict[Identity, stores.Row | None]) -> ChunkBuilder:
    builder = ChunkBuilder(RowLayout(VIEW), len(rows), with_origins=False)
    encode(builder, 0, batch(VIEW, rows))
    return builder


def _entries(store: Path) -> set[str]:
    return {path.name for path in generations_path(store, "doc").iterdir()}
