"""The cache of rows is shared by processes, forgets old rows, starts over when it is full, and survives killed
processes."""

import random
import time
from pathlib import Path

from shoal.engine.dynamodb.cache import NO_ROW, RowCache
from tests.failpoints.processes import running
from tests.server.serving import eventually

PREFIX = b"table..."
KEYS = [number.to_bytes(16, "little") for number in range(64)]


def value_of(key: bytes) -> bytes:
    return key * 40


def fill_for_ever(store: str, prefix: bytes) -> None:
    """Put sets of rows into a cache without end, so that the cache fills up again and again."""
    cache = RowCache.open(Path(store), 1 << 20)
    while True:
        keys = random.sample(KEYS, 20)
        cache.put(random.randbytes(8), {key: value_of(key) for key in keys}, 60.0)
        cache.put(prefix, {key: value_of(key) for key in keys}, 60.0)


def kill_one_that_fills(store: Path, cache: RowCache, prefix: bytes) -> None:
    with running(fill_for_ever, str(store), prefix, die_at=None, log=store / "log") as process:
        eventually(lambda: cache.get(prefix, KEYS), "rows of another process")
        time.sleep(random.uniform(0.0, 0.1))
        process.kill()
        process.join()


def test_rows_are_kept_for_their_time_by_table(tmp_path: Path) -> None:
    cache = RowCache.open(tmp_path, 1 << 20)
    assert RowCache.open(tmp_path, 1 << 20) is cache
    cache.put(PREFIX, {KEYS[0]: value_of(KEYS[0]), KEYS[1]: NO_ROW}, 60.0)
    assert cache.get(PREFIX, KEYS) == {KEYS[0]: value_of(KEYS[0]), KEYS[1]: NO_ROW}
    assert cache.get(b"another.", KEYS) == {}
    cache.put(PREFIX, {KEYS[0]: b"soon over"}, 0.05)
    time.sleep(0.1)
    assert cache.get(PREFIX, KEYS) == {KEYS[1]: NO_ROW}


def test_a_process_that_is_killed_while_it_fills_the_cache_harms_nobody(tmp_path: Path) -> None:
    cache = RowCache.open(tmp_path, 1 << 20)
    for prefix in (b"first...", b"second..", b"third..."):
        kill_one_that_fills(tmp_path, cache, prefix)
        found = cache.get(prefix, KEYS)
        assert found == {key: value_of(key) for key in found}
        cache.put(prefix, {KEYS[0]: b"written after"}, 60.0)
        assert cache.get(prefix, KEYS[:1]) == {KEYS[0]: b"written after"}


def test_what_another_boot_left_is_removed(tmp_path: Path) -> None:
    other = tmp_path / "remote-cache" / "another-boot"
    other.mkdir(parents=True)
    (other / "data.mdb").write_bytes(b"torn")
    RowCache.open(tmp_path, 1 << 20)
    assert not other.exists()
