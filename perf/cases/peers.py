"""Alternatives to Shoal for a ranker. Each is used in its usual way: with rows as packed bytes, or with one field per
feature."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import numpy.typing as npt
import redis
import rocksdict

from perf import servers
from perf.dataset import Dataset, document_keys, matrix, values
from perf.lookups import Lookup

LOADED_AT_ONCE = 20_000


def blocks(data: Dataset) -> Iterator[tuple[list[str], npt.NDArray[np.float32]]]:
    """Yield the keys and rows of all documents in blocks."""
    for start in range(0, data.rows, LOADED_AT_ONCE):
        documents = np.arange(start, min(start + LOADED_AT_ONCE, data.rows), dtype=np.int64)
        yield document_keys(documents), matrix(documents, data.features)


def lmdb_gets(directory: Path, data: Dataset) -> Lookup:
    """Return a lookup with py-lmdb: one get of a packed row per key, then one array."""
    env = lmdb.open(str(directory / "peer-lmdb"), map_size=64 << 30, sync=False, readahead=False)
    if env.stat()["entries"] != data.rows:
        for keys, rows in blocks(data):
            with env.begin(write=True) as transaction:
                for key, row in zip(keys, rows, strict=True):
                    transaction.put(key.encode(), row.tobytes())

    def lookup(keys: list[str]) -> npt.NDArray[np.floating]:
        with env.begin(buffers=True) as transaction:
            rows = [transaction.get(key.encode()) or b"" for key in keys]
            return np.frombuffer(b"".join(rows), np.float32).reshape(len(keys), data.features)

    return lookup


def rocksdb_multi_get(directory: Path, data: Dataset) -> Lookup:
    """Return a lookup with rocksdict: one multi_get of packed rows."""
    path = directory / "peer-rocksdb"
    fresh = not path.exists()
    store = rocksdict.Rdict(str(path), rocksdict.Options(raw_mode=True))
    if fresh:
        for keys, rows in blocks(data):
            batch = rocksdict.WriteBatch(raw_mode=True)
            for key, row in zip(keys, rows, strict=True):
                batch.put(key.encode(), row.tobytes())
            store.write(batch)
        store.flush()

    def lookup(keys: list[str]) -> npt.NDArray[np.floating]:
        rows: Any = store[[key.encode() for key in keys]]
        return np.frombuffer(b"".join(rows), np.float32).reshape(len(keys), data.features)

    return lookup


@contextmanager
def redis_lookups(directory: Path, data: Dataset) -> Iterator[dict[str, Lookup]]:
    """Yield two lookups with redis-py and hiredis on this machine: one MGET of packed rows, and one HMGET per key, all
    in one pipeline."""
    with servers.redis(directory) as port:
        client = redis.Redis(port=port)
        fields = [f"f{number}" for number in range(data.features)]
        for keys, rows in blocks(data):
            client.mset({key: row.tobytes() for key, row in zip(keys, rows, strict=True)})
            pipe = client.pipeline(transaction=False)
            for key, row in zip(keys, rows, strict=True):
                packed_row = row.tobytes()
                values_of_row = (packed_row[start : start + 4] for start in range(0, len(packed_row), 4))
                pipe.hset(f"h:{key}", mapping=dict(zip(fields, values_of_row, strict=True)))
            pipe.execute()

        def packed(keys: list[str]) -> npt.NDArray[np.floating]:
            rows: Any = client.mget(keys)
            return np.frombuffer(b"".join(rows), np.float32).reshape(len(keys), data.features)

        def by_field(keys: list[str]) -> npt.NDArray[np.floating]:
            pipe = client.pipeline(transaction=False)
            for key in keys:
                pipe.hmget(f"h:{key}", fields)
            rows = [b"".join(row) for row in pipe.execute()]
            return np.frombuffer(b"".join(rows), np.float32).reshape(len(keys), data.features)

        yield {"Redis, MGET of packed rows": packed, "Redis, HMGET of 50 fields a key": by_field}


def dict_of_rows(data: Dataset) -> Lookup:
    """Return a lookup that has the positions of rows in a dict, and all rows in one array."""
    position = _positions(data)
    rows = np.concatenate([rows for _, rows in blocks(data)])
    return lambda keys: rows.take([position[key] for key in keys], axis=0)


def dict_of_columns(data: Dataset) -> Lookup:
    """Return a lookup that has the positions of rows in a dict, and one array per feature, as in a data frame."""
    position = _positions(data)
    documents = np.arange(data.rows, dtype=np.int64)
    columns = [values(documents, feature) for feature in range(data.features)]

    def lookup(keys: list[str]) -> npt.NDArray[np.floating]:
        rows = np.array([position[key] for key in keys])
        return np.stack([column.take(rows) for column in columns], axis=1)

    return lookup


def _positions(data: Dataset) -> dict[str, int]:
    documents = np.arange(data.rows, dtype=np.int64)
    return {key: row for row, key in enumerate(document_keys(documents))}
