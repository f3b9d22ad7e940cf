"""Rereading a chunk finds a flipped bit on the disk or in memory. A failing disk is the same kind of error, and the
pages in memory stay unchanged."""

import ctypes
import gc
import mmap
import os
import re
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from shoal import FeatureStore
from shoal.engine.base.errors import StoreDamaged
from shoal.engine.format.catalog import SegmentRecord
from shoal.engine.format.paths import generation_path
from shoal.engine.kernels.memory import address_of
from shoal.engine.root.export_root import ExportRoot
from shoal.loaders.apply.compaction import fold
from shoal.loaders.backup.verify import verify_store
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.follow.repair import repair
from shoal.loaders.push.push import push_rows
from shoal.loaders.scrub import rereading
from shoal.loaders.scrub.rereading import ChunkGone, Rereader
from tests import stores
from tests.damage import base_path
from tests.stores import schema

VIEW = schema("doc", key="string", a="int64", text="string")
ROWS = 20_000


def rows(value: int, count: int = ROWS) -> list[stores.Row]:
    return [{"doc_id": f"key-{n}", "a": value, "text": f"{value}/{n} " * 20} for n in range(count)]


def make(directory: Path) -> Path:
    root = ExportRoot(directory / "root")
    stores.publish_snapshot(root, VIEW, rows(1))
    stores.publish_delta(root, VIEW, rows(2, ROWS // 2))
    stores.load(directory / "store", root)
    gc.collect()
    return directory / "store"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("rereading"))


def base_of(store: Path) -> SegmentRecord:
    return FeatureStore.open(store).version().view("doc").record.base


def read_base(store: Path, base: SegmentRecord) -> int:
    """Verify a base and return the number of bytes read."""
    path = generation_path(store, "doc", base.id) / "data.mdb"
    return sum(sum(Rereader().base_chunk(path, offset, "the chunk")) for offset in base.offsets)


def turn(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 16]))


def test_a_base_that_is_whole_is_read_and_found_whole(store: Path) -> None:
    base = base_of(store)
    assert base.bytes <= read_base(store, base) < base.bytes + (1 << 20)


def test_a_bit_that_turned_is_found_wherever_it_is(store: Path) -> None:
    base = base_of(store)
    path = base_path(store, "doc")
    begin = base.offsets[0]
    size = base.bytes
    # Places in the header: its magic, a section's offset, the size and the checksum. Then places across the whole
    # chunk.
    places = [
        begin,
        begin + 60,
        begin + 130,
        begin + 138,
        *range(begin + 200, begin + size, size // 12),
        begin + size - 1,
    ]
    for place in places:
        turn(path, place)
        with pytest.raises(StoreDamaged, match="the chunk"):
            read_base(store, base)
        turn(path, place)
    read_base(store, base)


@pytest.mark.parametrize("at", [0, 100, 138, 5_000, 300_000, -1])
def test_a_bit_that_turned_in_an_overlay_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    monkeypatch.setattr(rereading, "BLOCK_BYTES", 128 << 10)
    store = make(tmp_path)
    with StoreWriter(store) as writer:
        (overlay,) = writer.version().view("doc").record.overlays

        def read() -> int:
            chunks = [partial(writer.overlay_chunk, overlay, number) for number in range(overlay.chunks)]
            return sum(sum(Rereader().overlay_chunk(chunk, "the chunk")) for chunk in chunks)

        assert read() == overlay.bytes
        with writer.overlay_chunk(overlay, 0) as found:
            assert found is not None
            path, value = found
            content = bytes(value)
        turn(path, path.read_bytes().index(content) + at % len(content))
        with pytest.raises(StoreDamaged, match="the chunk"):
            read()


def test_a_chunk_that_is_gone_is_no_damage(store: Path, tmp_path: Path) -> None:
    with pytest.raises(ChunkGone):
        list(Rereader().base_chunk(tmp_path / "nowhere", 8208, "the chunk"))
    with StoreWriter(store) as writer:
        gone = writer.version().view("doc").record.overlays[0].model_copy(update={"id": "doc.1-1.gone"})
        with pytest.raises(ChunkGone):
            list(Rereader().overlay_chunk(lambda: writer.overlay_chunk(gone, 0), "the chunk"))


def test_a_base_that_was_cut_short_is_damaged(tmp_path: Path) -> None:
    store = make(tmp_path)
    base = base_of(store)
    path = base_path(store, "doc")
    gc.collect()
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(StoreDamaged, match="the chunk"):
        list(Rereader().base_chunk(path, base.offsets[0], "the chunk"))
    os.truncate(path, 0)
    with pytest.raises(StoreDamaged, match="the chunk"):
        list(Rereader().base_chunk(path, base.offsets[0], "the chunk"))


# --- the disk and the page cache --------------------------------------------------------------------------------


def resident(path: Path) -> int:
    """Return how many pages of a file are in memory."""
    with path.open("rb") as file:
        content = np.frombuffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), np.uint8)
    pages = np.zeros(-(-content.size // mmap.PAGESIZE), np.uint8)
    mincore = ctypes.CDLL(None).mincore
    arguments = ctypes.c_void_p(address_of(content)), ctypes.c_size_t(content.size), ctypes.c_void_p(address_of(pages))
    assert mincore(*arguments) == 0
    return int((pages & 1).sum())


def evict(path: Path) -> None:
    gc.collect()
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Disk:
    """A file system in an image file. Tests change bytes in the image, below the file system."""

    def __init__(self, directory: Path) -> None:
        self.image = directory / "image"
        self.path = directory / "disk"
        self.path.mkdir()
        with self.image.open("wb") as file:
            file.truncate(96 << 20)
        image = str(self.image)
        path = str(self.path)
        for command in (["mkfs.ext4", "-q", "-F", image], ["mount", "-o", "loop", image, path]):
            try:
                done = subprocess.run(command, capture_output=True, text=True)
            except FileNotFoundError as error:
                pytest.skip(f"no file system can be made here: {error}")
            if done.returncode:
                pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")

    def place_of(self, content: bytes) -> int:
        """Return the offset of some bytes on the disk."""
        return self.places_of(content)[0]

    def places_of(self, content: bytes) -> list[int]:
        """Return the offsets of all copies of some bytes on the disk, including those of deleted files."""
        subprocess.run(["sync", "-f", self.path], check=True)
        return [found.start() for found in re.finditer(re.escape(content), self.image.read_bytes())]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path)
    yield made
    subprocess.run(["umount", "--lazy", made.path], check=True)


def middle_of(path: Path, begin: bytes = b"1/777 1/777") -> bytes:
    """Return some bytes from the middle of a file that occur only once."""
    content = path.read_bytes()
    return content[content.index(begin) :][:160]


def test_a_bit_that_turned_on_the_disk_is_found_though_memory_has_it_right(disk: Disk) -> None:
    store = make(disk.path)
    base = base_of(store)
    path = base_path(store, "doc")
    text = middle_of(path)
    turn(disk.image, disk.place_of(text))
    assert text in path.read_bytes(), "memory has it right"
    with pytest.raises(StoreDamaged, match="memory and the disk have different bytes"):
        read_base(store, base)
    evict(path)
    with pytest.raises(StoreDamaged, match="has the checksum"):
        read_base(store, base)


def test_a_base_that_only_memory_has_wrong_is_taken_from_the_disk_with_its_pushed_rows(disk: Disk) -> None:
    store = make(disk.path)
    root = ExportRoot(disk.path / "root")
    pushed = {"doc_id": ["key-1"], "a": [7], "event_timestamp": [datetime.now(UTC)]}
    with StoreWriter(store) as writer:
        push_rows(writer, "doc", pushed)
        assert fold(writer, "doc")
    del writer
    gc.collect()
    base = base_of(store)
    path = base_path(store, "doc")
    gc.collect()
    text = middle_of(path, b"1/17777 1/17777")
    # The base before the fold contained the same text elsewhere on the disk.
    places = disk.places_of(text)
    for place in places:
        turn(disk.image, place)
    evict(path)
    with pytest.raises(StoreDamaged, match="has the checksum") as raised:
        read_base(store, base)
    assert text not in path.read_bytes(), "memory has it wrong"
    for place in places:
        turn(disk.image, place)
    with StoreWriter(store) as writer:
        reader = FeatureStore.open(store)
        assert writer.note_damage("doc", base, str(raised.value))
        assert repair(writer, root, "doc", raised.value, stores.NullObserver().started) is None
        assert read_base(store, base_of(store)) >= base.bytes
        found = reader.lookup(["doc:*"], {"doc_id": ["key-1", "key-17777"]}).to_pydict()
        assert found["doc:a"] == [7, 1]
        assert found["doc:text"][1] == rows(1)[17777]["text"]
    assert [checked for checked in verify_store(store) if checked.problem] == []


def test_a_disk_that_cannot_be_read_is_damage(disk: Disk) -> None:
    store = make(disk.path)
    base = base_of(store)
    path = base_path(store, "doc")
    place = disk.place_of(middle_of(path))
    evict(path)
    # The loop driver reads beyond the end of the truncated image file and fails.
    os.truncate(disk.image, place // 4096 * 4096)
    with pytest.raises(StoreDamaged, match=r"the chunk cannot be read from the disk: .*Input/output error"):
        read_base(store, base)


@pytest.mark.parametrize("reads_past_the_cache", [True, False])
def test_what_is_in_memory_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads_past_the_cache: bool
) -> None:
    store = make(tmp_path)
    path = base_path(store, "doc")
    if not reads_past_the_cache:
        # open(2) rejects or ignores this option.
        monkeypatch.setattr(os, "O_DIRECT", 1 << 30)
        monkeypatch.setattr("shoal.loaders.scrub.rereading._File.read_directly", lambda *_: None)
    evict(path)
    base = base_of(store)
    gc.collect()
    evict(path)
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for place in range(1 << 20, path.stat().st_size, 1 << 20):
            os.pread(file.fileno(), 1, place)
    before = resident(path)
    assert 0 < before < 100
    list(Rereader().base_chunk(path, base.offsets[0], "the chunk"))
    # Only the page of the chunk's header is added. Every process that opens the chunk reads this page.
    assert before <= resident(path) <= before + 2
