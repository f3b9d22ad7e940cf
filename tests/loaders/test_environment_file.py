"""LMDB can open a file that `EnvironmentFile` wrote, and finds each value at the reported offset."""

import errno
import os
from pathlib import Path

import lmdb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engine.format.paths import DATA
from shoal.loaders.segments.environment_file import PAGE, EnvironmentFile, StoredValue

SIZES = st.integers(PAGE, 3 * PAGE) | st.sampled_from([2 * PAGE - 17, 2 * PAGE - 16, 2 * PAGE - 15])


def value(number: int, size: int) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    return np.random.default_rng(number).integers(1, 256, size, np.uint8)


def key(number: int) -> bytes:
    return f"000000000001-96403ae9/{number:06d}".encode()


def found_in(directory: Path) -> dict[bytes, bytes]:
    with lmdb.open(str(directory), readonly=True, lock=False) as env, env.begin() as transaction:
        return dict(transaction.cursor())


@settings(max_examples=60)
@given(st.lists(SIZES, max_size=8))
def test_lmdb_finds_all_values(tmp_path_factory: pytest.TempPathFactory, sizes: list[int]) -> None:
    directory = tmp_path_factory.mktemp("env")
    file = EnvironmentFile(directory / DATA)
    offsets = [file.append(key(number), value(number, size)) for number, size in enumerate(sizes)]
    file.finish()
    assert found_in(directory) == {key(number): value(number, size).tobytes() for number, size in enumerate(sizes)}
    content = (directory / DATA).read_bytes()
    for number, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        assert offset % PAGE == 16
        assert content[offset : offset + size] == value(number, size).tobytes()
    assert len(content) % PAGE == 0


@pytest.mark.parametrize(("count", "depth"), [(0, 0), (1, 1), (70, 1), (100, 2), (10_000, 3)])
def test_however_many_values_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, depth: int) -> None:
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: None)
    file = EnvironmentFile(tmp_path / DATA)
    for number in range(count):
        file.append(key(number), np.array([number % 251], np.uint8))
    file.finish()
    assert found_in(tmp_path) == {key(number): bytes([number % 251]) for number in range(count)}
    with lmdb.open(str(tmp_path), readonly=True, lock=False) as env:
        about = env.stat()
        assert (about["entries"], about["depth"]) == (count, depth)
        assert about["overflow_pages"] == count
        pages = 2 + about["overflow_pages"] + about["leaf_pages"] + about["branch_pages"]
        assert (tmp_path / DATA).stat().st_size == pages * PAGE
        # LMDB's own copy reads the whole tree.
        (tmp_path / "copy").mkdir()
        env.copy(str(tmp_path / "copy"), compact=True)
    assert found_in(tmp_path / "copy") == found_in(tmp_path)


def test_lmdb_itself_writes_the_same_pages_of_values(tmp_path: Path) -> None:
    file = EnvironmentFile(tmp_path / DATA)
    offset = file.append(key(1), value(1, 20_000))
    ours = (tmp_path / DATA).read_bytes()[offset - 16 :]
    with lmdb.open(str(tmp_path / "theirs")) as env, env.begin(write=True) as transaction:
        transaction.put(key(1), value(1, 20_000).tobytes())
    theirs = (tmp_path / "theirs" / DATA).read_bytes()
    at = theirs.index(value(1, 20_000).tobytes()) - 16
    # All but the first 8 bytes, the page number.
    assert theirs[at + 8 : at + 16] == ours[8:16]


def test_a_file_goes_on_behind_the_values_it_holds(tmp_path: Path) -> None:
    file = EnvironmentFile(tmp_path / DATA)
    offsets = [file.append(key(number), value(number, 5000)) for number in range(3)]
    file.finish()
    held = [StoredValue(key(number), offsets[number], 5000) for number in range(2)]
    again = EnvironmentFile(tmp_path / DATA, held)
    assert again.append(key(2), value(9, 6000)) == offsets[2]
    again.finish()
    expected = {key(number): value(number, 5000).tobytes() for number in range(2)} | {key(2): value(9, 6000).tobytes()}
    assert found_in(tmp_path) == expected


@pytest.mark.parametrize("failing", ["posix_fallocate", "pwrite", "fdatasync"])
def test_nothing_is_left_of_a_value_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    file = EnvironmentFile(tmp_path / DATA)
    file.append(key(0), value(0, 5000))
    before = (tmp_path / DATA).read_bytes()

    def no_room(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, no_room)
        with pytest.raises(OSError, match="No space left"):
            file.append(key(1), value(1, 5000))
    assert (tmp_path / DATA).read_bytes() == before
    file.append(key(1), value(1, 5000))
    file.finish()
    assert set(found_in(tmp_path)) == {key(0), key(1)}


def test_a_write_that_the_system_cuts_short_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: whole(file, data[:1000], at))
    file = EnvironmentFile(tmp_path / DATA)
    file.append(key(0), value(0, 12345))
    file.finish()
    assert found_in(tmp_path) == {key(0): value(0, 12345).tobytes()}
